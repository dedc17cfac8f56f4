// mma.sync: d[16, 8] += a[16, 8 words] · b[8, 8 words]ᵀ, with the fragments as the PTX ISA gives them.
#pragma once
#include "simt_warp.h"

namespace simt {

template <class Sum> struct Fragments { uint32_t a[4], b[2]; Sum* d; };

// dot(x, y) multiplies two words, element by element, and adds up. Written from the result's side, lane by lane, and
// not with the loops of the kernels, so that both cannot share a mistake.
template <class Sum, class Dot>
static void mma(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Dot dot) {
    Fragments<Sum> mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, d};
    collective(~0u, MMA, mine, [dot](Fragments<Sum>** lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
                Sum sum = 0;
                for (int word = 0; word < 8; word++) {
                    uint32_t x = lanes[row % 8 * 4 + word % 4]->a[row / 8 + 2 * (word / 4)];
                    uint32_t y = lanes[column * 4 + word % 4]->b[word / 4];
                    sum += dot(x, y);
                }
                lanes[lane]->d[i] += sum;
            }
    });
}

static int dot_s8(uint32_t x, uint32_t y) {
    int sum = 0;
    for (int shift = 0; shift < 32; shift += 8)
        sum += static_cast<int8_t>(x >> shift) * static_cast<int8_t>(y >> shift);
    return sum;
}

static float word_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static float half_to_float(uint16_t half) {
    uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    if (exponent == 31) return word_to_float(sign | 0x7f800000 | fraction << 13);
    if (exponent) return word_to_float(sign | (exponent + 112) << 23 | fraction << 13);
    float denormal = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -denormal : denormal;
}

// Rounds to nearest, ties to even.
static uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return 0x7fff;
    if (bits >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
    if (bits < 0x38800000) {                       // below 2^-14: a multiple of 2^-24
        float scaled = word_to_float(bits) * 0x1p24f;
        return sign | static_cast<uint16_t>(__builtin_rintf(scaled));
    }
    bits += 0xfff + (bits >> 13 & 1);
    return sign | static_cast<uint16_t>((bits >> 13) - (112 << 10));
}

static float dot_f16(uint32_t x, uint32_t y) {
    return half_to_float(x) * half_to_float(y) + half_to_float(x >> 16) * half_to_float(y >> 16);
}

static float dot_bf16(uint32_t x, uint32_t y) {
    float low = word_to_float(x << 16) * word_to_float(y << 16);
    return low + word_to_float(x & 0xffff0000) * word_to_float(y & 0xffff0000);
}

}  // namespace simt
