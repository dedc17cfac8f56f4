// The kernels in plain C++, for any CPU. The loops over the rows of a panel are what the compiler vectorizes, with
// whatever the baseline of the machine has (SSE2 on x86-64, NEON on aarch64).
#include <cstring>

#include "activations.h"
#include "kernels.h"

namespace fbitrain {
namespace {

#include "activations.inl"
#include "pack.inl"
#include "salient.inl"

constexpr int kLanes = 16;  // rows summed at a time: few enough to stay in registers

void transpose(const uint32_t* words, ptrdiff_t stride, int n_words, uint32_t* panel) {
    for (int r = 0; r < kRows; ++r)
        for (int w = 0; w < n_words; ++w) panel[w * kRows + r] = words[r * stride + w];
}

void int8_block(const uint32_t* panel, int n_words, const int8_t* x, ptrdiff_t stride, int tokens, int32_t* sums) {
    for (int t = 0; t < tokens; ++t, x += stride, sums += kRows)
        for (int r0 = 0; r0 < kRows; r0 += kLanes) {
            uint32_t total[kLanes] = {};  // unsigned: adding a negative x wraps, as it should
            for (int w = 0; w < n_words; ++w)
                for (int p = 0; p < kWordBits; ++p) {
                    const uint32_t value = static_cast<uint32_t>(int32_t{x[w * kWordBits + p]});
                    const int column = 8 * (p % 4) + p / 4;
                    for (int r = 0; r < kLanes; ++r)
                        total[r] += value & (0u - ((panel[w * kRows + r0 + r] >> column) & 1u));
                }
            for (int r = 0; r < kLanes; ++r) sums[r0 + r] += static_cast<int32_t>(total[r]);
        }
}

void float_tables(const float* z, int n_words, float* tables) { std::memcpy(tables, z, sizeof(float) * 32 * n_words); }

void float_block(const uint32_t* panel, int n_words, const float* tables, ptrdiff_t stride, int tokens, float* sums) {
    for (int t = 0; t < tokens; ++t, tables += stride, sums += kRows)
        for (int r0 = 0; r0 < kRows; r0 += kLanes) {
            float total[kLanes] = {};
            for (int w = 0; w < n_words; ++w)
                for (int k = 0; k < kWordBits; ++k) {
                    uint32_t pattern, flipped[kLanes];
                    std::memcpy(&pattern, &tables[w * kWordBits + k], sizeof pattern);
                    for (int r = 0; r < kLanes; ++r)  // a clear bit flips the sign
                        flipped[r] = pattern ^ ((~(panel[w * kRows + r0 + r] >> k)) << 31);
                    float terms[kLanes];
                    std::memcpy(terms, flipped, sizeof terms);
                    for (int r = 0; r < kLanes; ++r) total[r] += terms[r];
                }
            for (int r = 0; r < kLanes; ++r) sums[r0 + r] += total[r];
        }
}

uint32_t popcount(uint32_t x) {  // Hacker's Delight, figure 5-2
    x -= (x >> 1) & 0x55555555u;
    x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
    x = (x + (x >> 4)) & 0x0F0F0F0Fu;
    x += x >> 8;
    return (x + (x >> 16)) & 0x3Fu;
}

void xnor_block(const uint32_t* panel, int n_words, const uint32_t* a, const uint8_t*, ptrdiff_t stride, int tokens,
                int32_t* sums) {
    for (int t = 0; t < tokens; ++t, a += stride, sums += kRows)
        for (int w = 0; w < n_words; ++w)
            for (int r = 0; r < kRows; ++r) sums[r] += static_cast<int32_t>(popcount(a[w] ^ panel[w * kRows + r]));
}

}  // namespace

const KernelSet kPortable = {"portable",   transpose,     int8_block,    0,              nullptr,      kWordBits,
                             float_tables, float_block,   xnor_block,    salient_decode, salient_sums, pack_row,
                             unpack_row,   scale_columns, sum_columns,   quantize,       split_digits, sum_quantized,
                             finish_int8};

}  // namespace fbitrain
