// A token's activations, made ready for the block functions: scaled, quantized, or turned into tables.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace fbitrain {

inline float from_bfloat16(uint16_t pattern) {
    const uint32_t bits = uint32_t{pattern} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : static_cast<uint16_t>(rounded);
}

inline float rounded_to_bfloat16(float value) { return from_bfloat16(to_bfloat16(value)); }

// Sixteen running sums: the compiler may not reorder additions of floats, but these it can do side by side.
template <typename Term>
float sum_of(int64_t k, const Term& term) {
    constexpr int kLanes = 16;
    float partial[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) partial[lane] += term(i + lane);
    for (; i < k; ++i) partial[i % kLanes] += term(i);
    float total = 0;
    for (float value : partial) total += value;
    return total;
}

// max |z|, or NaN or infinity if z holds one.
inline float largest_magnitude(const float* z, int64_t k) {
    constexpr int kLanes = 16;
    uint32_t largest[kLanes] = {};  // as patterns without the sign: these order like the values, and NaN comes last
    const auto pattern = [z](int64_t i) {
        uint32_t bits;
        std::memcpy(&bits, z + i, sizeof bits);
        return bits & 0x7FFFFFFFu;
    };
    int64_t i = 0;
    for (; i + kLanes <= k; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint32_t bits = pattern(i + lane);
            largest[lane] = bits > largest[lane] ? bits : largest[lane];
        }
    for (; i < k; ++i) largest[0] = pattern(i) > largest[0] ? pattern(i) : largest[0];
    for (uint32_t bits : largest) largest[0] = bits > largest[0] ? bits : largest[0];
    float value;
    std::memcpy(&value, largest, sizeof value);
    return value;
}

// q = z / scale rounded to nearest even, scale = max |z| / 127, in the column order of KernelSet::int8_block. z is
// [padded] with zeros past the row's end; padded is a multiple of 32. Returns scale: 0 where z is all but zero (q is 0
// then), NaN or infinity where z holds one (q is not written then).
inline float quantize(const float* z, int64_t padded, int8_t* q) {
    const float scale = largest_magnitude(z, padded) / 127.0f;
    if (!std::isfinite(scale)) return scale;
    constexpr float kSmallestNormal = 1.17549435e-38f;
    if (scale < kSmallestNormal) {
        std::memset(q, 0, static_cast<size_t>(padded));
        return 0.0f;
    }
    const float inverse = 1.0f / scale;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its last bit is worth 1, so adding it rounds to an integer
    for (int64_t word = 0; word < padded / kWordBits; ++word, z += kWordBits, q += kWordBits) {
        float shifted[kWordBits];
        uint32_t low[kWordBits], fours[8];
        for (int i = 0; i < kWordBits; ++i) shifted[i] = z[i] * inverse + kRound;
        std::memcpy(low, shifted, sizeof low);
        for (uint32_t& pattern : low) pattern &= 0xFF;  // the integer, as int8
        for (int j = 0; j < 8; ++j) fours[j] = low[j] | low[8 + j] << 8 | low[16 + j] << 16 | low[24 + j] << 24;
        std::memcpy(q, fours, sizeof fours);
    }
    return scale;
}

}  // namespace fbitrain
