// Stands in for the compiler's <immintrin.h>, so that avx512.cpp and amx.cpp run on any CPU: the intrinsics they use, in
// plain C++, after the operations in Intel's Intrinsics Guide. An address that the instruction needs aligned is checked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

struct __m128i {
    uint64_t low, high;
};
struct __m512i {
    uint32_t lane[16];
};
struct __m256i {
    uint16_t half[16];
};
typedef float __m512 __attribute__((vector_size(64)));  // a vector of the compiler's, for dense_math.inl computes with it

inline void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "emulated instruction: %s\n", what);
    std::abort();
}
inline void require_aligned(const void* p) { require(reinterpret_cast<uintptr_t>(p) % 64 == 0, "unaligned address"); }

template <typename Lane>
__m512i each_lane(Lane lane) {
    __m512i result;
    for (int i = 0; i < 16; ++i) result.lane[i] = lane(i);
    return result;
}

inline __m512i _mm512_load_si512(const void* p) {
    require_aligned(p);
    __m512i result;
    std::memcpy(&result, p, sizeof result);
    return result;
}
inline __m512i _mm512_loadu_si512(const void* p) {
    __m512i result;
    std::memcpy(&result, p, sizeof result);
    return result;
}
using __mmask16 = uint16_t;
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
    __m512i result = {};
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) std::memcpy(&result.lane[i], static_cast<const char*>(p) + 4 * i, 4);
    return result;
}
inline int _mm512_reduce_add_epi32(__m512i v) {
    uint32_t total = 0;
    for (uint32_t lane : v.lane) total += lane;
    return static_cast<int>(total);
}
inline void _mm512_store_si512(void* p, __m512i v) {
    require_aligned(p);
    std::memcpy(p, &v, sizeof v);
}
inline __m512 _mm512_load_ps(const void* p) {
    require_aligned(p);
    __m512 result;
    std::memcpy(&result, p, sizeof result);
    return result;
}
inline void _mm512_store_ps(void* p, __m512 v) {
    require_aligned(p);
    std::memcpy(p, &v, sizeof v);
}
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512i _mm512_set1_epi32(int32_t x) {
    return each_lane([=](int) { return static_cast<uint32_t>(x); });
}
inline __m512i _mm512_set1_epi8(int8_t x) {
    return _mm512_set1_epi32(static_cast<int32_t>(0x01010101u * static_cast<uint8_t>(x)));
}
inline __m512 _mm512_set1_ps(float x) {
    __m512 result;
    for (int i = 0; i < 16; ++i) result[i] = x;
    return result;
}
inline __m512i _mm512_castps_si512(__m512 v) {
    __m512i result;
    std::memcpy(&result, &v, sizeof v);
    return result;
}
inline __m512 _mm512_castsi512_ps(__m512i v) {
    __m512 result;
    std::memcpy(&result, &v, sizeof v);
    return result;
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return each_lane([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
    return each_lane([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
    for (int i = 0; i < 16; ++i) a[i] += b[i];
    return a;
}
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
    for (int i = 0; i < 16; ++i) a[i] *= b[i];
    return a;
}
inline float _mm512_reduce_add_ps(__m512 v) {
    float total = 0;
    for (int i = 0; i < 16; ++i) total += v[i];
    return total;
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
    __m512 result = _mm512_setzero_ps();
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1) result[i] = static_cast<const float*>(p)[i];
    return result;
}
inline void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
inline __m512i _mm512_andnot_si512(__m512i a, __m512i b) {
    return each_lane([&](int i) { return ~a.lane[i] & b.lane[i]; });
}
inline __m512i _mm512_sllv_epi32(__m512i a, __m512i count) {
    return each_lane([&](int i) { return count.lane[i] > 31 ? 0u : a.lane[i] << count.lane[i]; });
}
inline __m512i _mm512_mask_i32gather_epi32(__m512i source, __mmask16 mask, __m512i index, const void* p, int scale) {
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1)
            std::memcpy(&source.lane[i], static_cast<const char*>(p) + int64_t{static_cast<int32_t>(index.lane[i])} * scale, 4);
    return source;
}
inline __m512 _mm512_mask_i32gather_ps(__m512 source, __mmask16 mask, __m512i index, const void* p, int scale) {
    for (int i = 0; i < 16; ++i)
        if (mask >> i & 1)
            source[i] = *reinterpret_cast<const float*>(static_cast<const char*>(p) +
                                                        int64_t{static_cast<int32_t>(index.lane[i])} * scale);
    return source;
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
    return each_lane([&](int i) { return count > 31 ? 0u : a.lane[i] >> count; });
}
inline __m128i _mm_cvtsi32_si128(int32_t x) { return {static_cast<uint32_t>(x), 0}; }
inline __m512i _mm512_srl_epi32(__m512i a, __m128i count) {
    return each_lane([&](int i) { return count.low > 31 ? 0u : a.lane[i] >> count.low; });
}
inline __m512i _mm512_sra_epi32(__m512i a, __m128i count) {
    const int shift = count.low > 31 ? 31 : static_cast<int>(count.low);
    return each_lane([&](int i) { return static_cast<uint32_t>(static_cast<int32_t>(a.lane[i]) >> shift); });
}
inline __m512i _mm512_set1_epi64(int64_t x) {
    return each_lane([&](int i) { return static_cast<uint32_t>(static_cast<uint64_t>(x) >> (i % 2 ? 32 : 0)); });
}
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
    return each_lane([&](int i) { return (i % 2 ? b : a).lane[i / 4 * 4 + i % 4 / 2]; });
}
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
    return each_lane([&](int i) { return (i % 2 ? b : a).lane[i / 4 * 4 + 2 + i % 4 / 2]; });
}
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
    return each_lane([&](int i) { return (i % 4 / 2 ? b : a).lane[i / 4 * 4 + i % 2]; });
}
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
    return each_lane([&](int i) { return (i % 4 / 2 ? b : a).lane[i / 4 * 4 + 2 + i % 2]; });
}
inline __m128i _mm512_extracti32x4_epi32(__m512i a, int quarter) {
    __m128i result;
    std::memcpy(&result, a.lane + 4 * quarter, sizeof result);
    return result;
}
inline __m128i _mm_add_epi32(__m128i a, __m128i b) {
    const auto add = [](uint64_t x, uint64_t y) {
        return uint64_t{static_cast<uint32_t>(x) + static_cast<uint32_t>(y)} | ((x >> 32) + (y >> 32)) << 32;
    };
    return {add(a.low, b.low), add(a.high, b.high)};
}
// Each byte of x times an 8 x 8 matrix of bits, that of its 8 bytes: bit i of the result is the parity of the byte and byte
// 7 - i of the matrix.
inline __m512i _mm512_gf2p8affine_epi64_epi8(__m512i x, __m512i matrix, int constant) {
    return each_lane([&](int i) {
        const uint64_t rows = matrix.lane[i / 2 * 2] | uint64_t{matrix.lane[i / 2 * 2 + 1]} << 32;
        uint32_t result = 0;
        for (int bit = 0; bit < 32; ++bit) {
            const uint32_t byte = x.lane[i] >> bit / 8 * 8 & 0xFF;
            const auto row = static_cast<uint32_t>(rows >> 8 * (7 - bit % 8)) & 0xFF;
            result |= static_cast<uint32_t>((__builtin_popcount(byte & row) & 1) ^ (constant >> bit % 8 & 1)) << bit;
        }
        return result;
    });
}
inline __m512i _mm512_popcnt_epi32(__m512i a) {
    return each_lane([&](int i) { return static_cast<uint32_t>(__builtin_popcount(a.lane[i])); });
}
inline __m512 _mm512_permutexvar_ps(__m512i index, __m512 table) {
    __m512 result;
    for (int i = 0; i < 16; ++i) result[i] = table[index.lane[i] & 15];
    return result;
}
inline __m256i _mm256_loadu_si256(const __m256i* p) {
    __m256i result;
    std::memcpy(&result, p, sizeof result);
    return result;
}
inline void _mm256_storeu_si256(__m256i* p, __m256i v) { std::memcpy(p, &v, sizeof v); }
inline __m512 _mm512_cvtph_ps(__m256i v) {
    __m512 result;
    for (int i = 0; i < 16; ++i) {
        const int exponent = v.half[i] >> 10 & 31, fraction = v.half[i] & 1023;
        const float size = exponent == 31   ? (fraction ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                           : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
        result[i] = std::copysign(size, v.half[i] >> 15 ? -1.0f : 1.0f);
    }
    return result;
}
constexpr int _MM_FROUND_TO_NEAREST_INT = 0;
inline __m256i _mm512_cvtps_ph(__m512 v, int) {
    __m256i result;
    for (int i = 0; i < 16; ++i) {
        const float size = std::fabs(v[i]);
        int bits = 0x7E00;  // NaN
        if (size >= 65520.0f) {
            bits = 0x7C00;
        } else if (size == size) {
            const int exponent = size > 0 ? std::max(std::ilogb(size), -14) : -14;
            bits = ((exponent + 14) << 10) + static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
        }
        result.half[i] = static_cast<uint16_t>(bits | (std::signbit(v[i]) ? 0x8000 : 0));
    }
    return result;
}
// Four unsigned bytes of a times four signed bytes of b, summed without saturation.
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
    return each_lane([&](int i) {
        uint32_t total = sum.lane[i];
        for (int byte = 0; byte < 4; ++byte)
            total += static_cast<uint32_t>(static_cast<int32_t>(a.lane[i] >> (8 * byte) & 0xFF) *
                                           static_cast<int8_t>(b.lane[i] >> (8 * byte) & 0xFF));
        return total;
    });
}

// --- AMX ---

struct Tiles {
    bool configured = false;
    uint8_t rows[8] = {};
    uint16_t row_bytes[8] = {};
    uint8_t data[8][16][64] = {};
};
inline Tiles& tiles() {
    static thread_local Tiles all;
    return all;
}
inline void require_tile(int t) { require(tiles().configured && tiles().rows[t] > 0, "a tile that is not configured"); }

inline void _tile_loadconfig(const void* p) {
    const auto* bytes = static_cast<const uint8_t*>(p);
    require(bytes[0] == 1 && bytes[1] == 0, "palette 1 and start row 0");
    for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "reserved bytes of a tile configuration");
    tiles() = Tiles();
    for (int t = 0; t < 8; ++t) {
        std::memcpy(&tiles().row_bytes[t], bytes + 16 + 2 * t, 2);
        tiles().rows[t] = bytes[48 + t];
        require(tiles().rows[t] <= 16 && tiles().row_bytes[t] <= 64, "a tile larger than 16 x 64");
        require((tiles().rows[t] == 0) == (tiles().row_bytes[t] == 0), "a tile with rows or columns only");
    }
    tiles().configured = true;
}
inline void _tile_release() { tiles() = Tiles(); }
inline void _tile_loadd(int t, const void* base, ptrdiff_t stride) {
    require_tile(t);
    std::memset(tiles().data[t], 0, sizeof tiles().data[t]);
    for (int r = 0; r < tiles().rows[t]; ++r)
        std::memcpy(tiles().data[t][r], static_cast<const char*>(base) + r * stride, tiles().row_bytes[t]);
}
inline void _tile_stored(int t, void* base, ptrdiff_t stride) {
    require_tile(t);
    for (int r = 0; r < tiles().rows[t]; ++r)
        std::memcpy(static_cast<char*>(base) + r * stride, tiles().data[t][r], tiles().row_bytes[t]);
}
// sum [M][N] of int32 += a [M][K] of int8 times b [K / 4][N][4] of uint8.
inline void _tile_dpbsud(int sum, int a, int b) {
    Tiles& all = tiles();
    require_tile(sum), require_tile(a), require_tile(b);
    require(all.rows[sum] == all.rows[a] && all.row_bytes[sum] == all.row_bytes[b] &&
                all.row_bytes[a] == 4 * all.rows[b],
            "tiles whose shapes do not fit");
    for (int m = 0; m < all.rows[sum]; ++m)
        for (int n = 0; n < all.row_bytes[sum] / 4; ++n) {
            uint32_t total;
            std::memcpy(&total, &all.data[sum][m][4 * n], 4);
            for (int k = 0; k < all.row_bytes[a]; ++k)
                total += static_cast<uint32_t>(static_cast<int8_t>(all.data[a][m][k]) *
                                               int32_t{all.data[b][k / 4][4 * n + k % 4]});
            std::memcpy(&all.data[sum][m][4 * n], &total, 4);
        }
}
