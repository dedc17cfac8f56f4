// A token's activations on their way to the block functions, and the products on their way back. Included by each
// instruction set's file inside its own unnamed namespace, as pack.inl is. Sums of floats have the same order in all.

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

// z = x [k] of float32 or bfloat16, times alpha where there is one.
void scale_columns(const void* x, bool bfloat16, const float* alpha, int64_t k, float* z) {
    if (bfloat16) {
        for (int64_t i = 0; i < k; ++i) z[i] = from_bfloat16(static_cast<const uint16_t*>(x)[i]);
        for (int64_t i = 0; alpha && i < k; ++i) z[i] *= rounded_to_bfloat16(alpha[i]);
    } else if (alpha) {
        for (int64_t i = 0; i < k; ++i) z[i] = static_cast<const float*>(x)[i] * alpha[i];
    } else {
        __builtin_memcpy(z, x, sizeof(float) * k);
    }
}

// The sum of x [k], as above, times beta where there is one.
float sum_columns(const void* x, bool bfloat16, const float* beta, int64_t k) {
    const auto* floats = static_cast<const float*>(x);
    const auto* brains = static_cast<const uint16_t*>(x);
    if (bfloat16 && beta)
        return sum_of(k, [=](int64_t i) { return from_bfloat16(brains[i]) * rounded_to_bfloat16(beta[i]); });
    if (bfloat16) return sum_of(k, [=](int64_t i) { return from_bfloat16(brains[i]); });
    if (beta) return sum_of(k, [=](int64_t i) { return floats[i] * beta[i]; });
    return sum_of(k, [=](int64_t i) { return floats[i]; });
}

// max |z|, or NaN or infinity if z holds one.
float largest_magnitude(const float* z, int64_t k) {
    constexpr int kLanes = 16;
    uint32_t largest[kLanes] = {};  // as patterns without the sign: these order like the values, and NaN comes last
    const auto pattern = [z](int64_t i) {
        uint32_t bits;
        __builtin_memcpy(&bits, z + i, sizeof bits);
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
    __builtin_memcpy(&value, largest, sizeof value);
    return value;
}

// q = z / scale rounded to nearest even, scale = max |z| / 127, in the column order of KernelSet::int8_block. z is
// [padded] with zeros past the row's end; padded is a multiple of 32. Returns scale: 0 where z is all but zero (q is 0
// then), NaN or infinity where z holds one (q is not written then).
float quantize(const float* z, int64_t padded, int8_t* q) {
    const float scale = largest_magnitude(z, padded) / 127.0f;
    if (!__builtin_isfinite(scale)) return scale;
    constexpr float kSmallestNormal = 1.17549435e-38f;
    if (scale < kSmallestNormal) {
        __builtin_memset(q, 0, static_cast<size_t>(padded));
        return 0.0f;
    }
    const float inverse = 1.0f / scale;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its last bit is worth 1, so adding it rounds to an integer
    for (int64_t word = 0; word < padded / kWordBits; ++word, z += kWordBits, q += kWordBits) {
        float shifted[kWordBits];
        uint32_t low[kWordBits], fours[8];
        for (int i = 0; i < kWordBits; ++i) shifted[i] = z[i] * inverse + kRound;
        __builtin_memcpy(low, shifted, sizeof low);
        for (uint32_t& pattern : low) pattern &= 0xFF;  // the integer, as int8
        for (int j = 0; j < 8; ++j) fours[j] = low[j] | low[8 + j] << 8 | low[16 + j] << 16 | low[24 + j] << 24;
        __builtin_memcpy(q, fours, sizeof fours);
    }
    return scale;
}

// z = scale * (d[0] + 256 * d[1] + 65536 * d[2]), rounded to 24 bits of its largest magnitude: each digit as `quantize`
// orders its values, d[0] of all columns first. Returns scale: 0 where z is zero, NaN or infinity where z holds one or
// is too small for this (q is not written then).
float split_digits(const float* z, int64_t padded, int8_t* q) {
    constexpr float kLargest = 127 * 65536.0f;  // with the last digit's 128 and roundings, at most 127 in the first
    constexpr float kSmallestNormal = 1.17549435e-38f;
    const float largest = largest_magnitude(z, padded), scale = largest / kLargest;
    if (!__builtin_isfinite(scale)) return scale;
    if (largest == 0.0f) {
        __builtin_memset(q, 0, static_cast<size_t>(kDigits * padded));
        return 0.0f;
    }
    if (scale < kSmallestNormal) return __builtin_nanf("");
    const float inverse = 1.0f / scale;
    for (int64_t word = 0; word < padded / kWordBits; ++word, z += kWordBits, q += kWordBits) {
        int32_t rest[kWordBits];
        for (int i = 0; i < kWordBits; ++i) {
            const float value = z[i] * inverse;
            rest[i] = static_cast<int32_t>(value + (value < 0 ? -0.5f : 0.5f));
        }
        for (int digit = 0; digit < kDigits; ++digit) {
            uint32_t low[kWordBits], fours[8];
            for (int i = 0; i < kWordBits; ++i) {
                low[i] = static_cast<uint32_t>(rest[i]) & 0xFF;
                rest[i] = (rest[i] + 128) >> 8;  // what is left once a digit of -128 to 127 is taken off
            }
            for (int j = 0; j < 8; ++j) fours[j] = low[j] | low[8 + j] << 8 | low[16 + j] << 16 | low[24 + j] << 24;
            __builtin_memcpy(q + digit * padded, fours, sizeof fours);
        }
    }
    return scale;
}

int32_t sum_quantized(const int8_t* q, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += q[i];
    return total;
}

int32_t sum_magnitudes(const int8_t* q, int64_t n) {
    int32_t total = 0;
    for (int64_t i = 0; i < n; ++i) total += q[i] < 0 ? -q[i] : q[i];
    return total;
}

// y of the kRows rows of a panel and one token, from its sums over the bits that are set: twice that minus `total` is
// the sum with signs. It fits, but twice the sum may not: modulo 2^32.
void finish_int8(const int32_t* sums, int32_t total, float scale, const float* factor, float shift, const float* beta,
                 float* y) {
    for (int r = 0; r < kRows; ++r) {
        const auto with_signs = static_cast<int32_t>(2 * static_cast<uint32_t>(sums[r]) - static_cast<uint32_t>(total));
        y[r] = static_cast<float>(with_signs) * scale * factor[r] + shift * beta[r];
    }
}

constexpr Activations kActivations = {
    .scale_columns = scale_columns,
    .sum_columns = sum_columns,
    .quantize = quantize,
    .split_digits = split_digits,
    .sum_quantized = sum_quantized,
    .sum_magnitudes = sum_magnitudes,
    .finish_int8 = finish_int8,
};
