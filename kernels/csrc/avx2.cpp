// The kernels with AVX2: 8 rows of a panel per register. docs/kernels.md draws the data paths.
#include <immintrin.h>

#include "activations.h"
#include "kernels.h"

namespace fbitrain {
namespace {

#include "activations.inl"
#include "pack.inl"
#include "salient.inl"

constexpr int kLanes = 8;
constexpr int kGroups = kRows / kLanes;       // registers that hold one word of every row
constexpr int kTileTokens = 6;                // xnor and float tiles: tokens x 2 registers of sums
constexpr int kPairTables = kWordBits / 2;    // float: one table of 4 sums per pair of columns

__m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }

void add_to(int32_t* sums, __m256i values) {
    auto* p = reinterpret_cast<__m256i*>(sums);
    _mm256_store_si256(p, _mm256_add_epi32(_mm256_load_si256(p), values));
}

// Has the compiler finish this sum before it starts on the next. Left to itself, gcc reorders a tile's products until
// they no longer fit the registers, at half the speed.
template <typename Register>
void in_register(Register& sum) {
    __asm__("" : "+x"(sum));
}

// --- int8 ---

// Sixteen 16-bit sums, two neighbours belonging to one row -> 8 sums of 32 bits.
__m256i widen(__m256i sums16) { return _mm256_madd_epi16(sums16, _mm256_set1_epi16(1)); }

// x of four columns, the same for all 8 rows.
__m256i four(const int8_t* x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, sizeof bytes);
    return _mm256_set1_epi32(bytes);
}

// The 32-bit sum of four 16-bit sums of which sum[j] holds 2^j times its value.
__m256i unscaled(const __m256i* sum) {
    const __m256i low = _mm256_add_epi16(sum[0], _mm256_srai_epi16(sum[1], 1));
    const __m256i high = _mm256_add_epi16(_mm256_srai_epi16(sum[2], 2), _mm256_srai_epi16(sum[3], 3));
    return widen(_mm256_add_epi16(low, high));
}

// One token. A bit is used where it stands: byte (bit << j) times x, for j < 4, and the same again after a shift by 4,
// so that three instructions (and, multiply-add of pairs, add) do 32 weights. sum[j] holds 2^j times its value; it
// takes 2 * kLoadWords terms of at most 2 * 8 * 127 before it is read, which 16 bits just hold.
template <int kRegisters>
void int8_one_token(const uint32_t* panel, int n_words, const int8_t* x, int32_t* sums) {
    const __m256i mask[4] = {_mm256_set1_epi8(1), _mm256_set1_epi8(2), _mm256_set1_epi8(4), _mm256_set1_epi8(8)};
    for (int begin = 0; begin < n_words; begin += kLoadWords) {
        const int end = begin + kLoadWords < n_words ? begin + kLoadWords : n_words;
        __m256i sum[kRegisters][4] = {};
        for (int w = begin; w < end; ++w)
            #pragma GCC unroll 8
            for (int half = 0; half < 2; ++half)
                #pragma GCC unroll 8
                for (int j = 0; j < 4; ++j) {
                    const __m256i x4 = four(x + w * kWordBits + half * 16 + j * 4);
                    #pragma GCC unroll 8
                    for (int g = 0; g < kRegisters; ++g) {
                        __m256i bits = load(panel + w * kRows + g * kLanes);
                        if (half) bits = _mm256_srli_epi32(bits, 4);
                        const __m256i products = _mm256_maddubs_epi16(_mm256_and_si256(bits, mask[j]), x4);
                        sum[g][j] = _mm256_add_epi16(sum[g][j], products);
                        in_register(sum[g][j]);
                    }
                }
        #pragma GCC unroll 8
        for (int g = 0; g < kRegisters; ++g) add_to(sums + g * kLanes, unscaled(sum[g]));
    }
}

// The first n of the 8 words at p, zeros for the others.
__m256i load_words(const uint32_t* p, int64_t n) {
    if (n >= kLanes) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p),
                                 _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane));
}

int32_t sum_lanes(__m256i v) {
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

// How far ahead of their use the bits are fetched, 4 KiB. Measured: without it, a weight that comes from memory and not
// from a cache takes 1.5 to 2 times as long.
constexpr int64_t kWordsAhead = 1024;

// kTogether rows as int8_one_token does them, but a register holds 8 words of one row instead of one word of 8 rows.
template <int kTogether>
void int8_together(const uint32_t* words, int64_t n_words, const int8_t* x, int32_t* sums) {
    const __m256i mask[4] = {_mm256_set1_epi8(1), _mm256_set1_epi8(2), _mm256_set1_epi8(4), _mm256_set1_epi8(8)};
    __m256i total[kTogether] = {};
    for (int64_t begin = 0; begin < n_words; begin += kLanes * kLoadWords) {
        for (int r = 0; r < kTogether; ++r)
            for (int line = 0; line < 4; ++line)
                __builtin_prefetch(words + r * n_words + begin + kWordsAhead + 16 * line);
        __m256i sum[kTogether][4] = {};
        for (int64_t w = begin; w < n_words && w < begin + kLanes * kLoadWords; w += kLanes) {
            __m256i bits[kTogether];
#pragma GCC unroll 4
            for (int r = 0; r < kTogether; ++r) bits[r] = load_words(words + r * n_words + w, n_words - w);
#pragma GCC unroll 2
            for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const __m256i x32 = load(x + (w + 4 * half + j) * kWordBits);
#pragma GCC unroll 4
                    for (int r = 0; r < kTogether; ++r) {
                        const __m256i products = _mm256_maddubs_epi16(_mm256_and_si256(bits[r], mask[j]), x32);
                        sum[r][j] = _mm256_add_epi16(sum[r][j], products);
                        in_register(sum[r][j]);
                    }
                }
#pragma GCC unroll 4
                for (int r = 0; r < kTogether; ++r) bits[r] = _mm256_srli_epi32(bits[r], 4);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < kTogether; ++r) total[r] = _mm256_add_epi32(total[r], unscaled(sum[r]));
    }
    for (int r = 0; r < kTogether; ++r) sums[r] = sum_lanes(total[r]);
}

void int8_rows(const uint32_t* words, int64_t n_words, int rows, const int8_t* x, int32_t* sums) {
    int r = 0;
    for (; r + 2 <= rows; r += 2) int8_together<2>(words + r * n_words, n_words, x, sums + r);
    if (r < rows) int8_together<1>(words + r * n_words, n_words, x, sums + r);
}

void int8_block(const uint32_t* panel, int n_words, const int8_t* x, ptrdiff_t stride, int tokens, int32_t* sums) {
    for (int t = 0; t < tokens; ++t)
        for (int g = 0; g < kGroups; g += 2)
            int8_one_token<2>(panel + g * kLanes, n_words, x + t * stride, sums + t * kRows + g * kLanes);
}

// --- float ---

// For columns k and k + 1 with z values a and b, the sums that their two bits can select: -a-b, a-b, -a+b, a+b.
void float_tables(const float* z, int n_words, float* tables) {
    const __m128 sign_a = _mm_setr_ps(-0.0f, 0.0f, -0.0f, 0.0f), sign_b = _mm_setr_ps(-0.0f, -0.0f, 0.0f, 0.0f);
    for (int pair = 0; pair < n_words * kPairTables; ++pair) {
        const __m128 a = _mm_xor_ps(_mm_set1_ps(z[2 * pair]), sign_a);
        const __m128 b = _mm_xor_ps(_mm_set1_ps(z[2 * pair + 1]), sign_b);
        _mm_storeu_ps(tables + 4 * pair, _mm_add_ps(a, b));
    }
}

// kTokens x kRegisters * 8 rows: vpermilps looks at the two lowest bits of each lane, so that a shift (shared by all
// tokens), a lookup and an add do 16 weights.
template <int kTokens, int kRegisters>
void float_tile(const uint32_t* panel, int n_words, const float* tables, ptrdiff_t stride, float* sums) {
    __m256 sum[kTokens][kRegisters] = {};
    for (int w = 0; w < n_words; ++w) {
        __m256i bits[kRegisters];
        #pragma GCC unroll 8
        for (int g = 0; g < kRegisters; ++g) bits[g] = load(panel + w * kRows + g * kLanes);
#pragma GCC unroll 1
        for (int pair = 0; pair < kPairTables; ++pair) {
            #pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
                const __m256 table = _mm256_broadcast_ps(
                    reinterpret_cast<const __m128*>(tables + t * stride + 4 * (w * kPairTables + pair)));
                #pragma GCC unroll 8
                for (int g = 0; g < kRegisters; ++g) {
                    sum[t][g] = _mm256_add_ps(sum[t][g], _mm256_permutevar_ps(table, bits[g]));
                    in_register(sum[t][g]);
                }
            }
            #pragma GCC unroll 8
            for (int g = 0; g < kRegisters; ++g) bits[g] = _mm256_srli_epi32(bits[g], 2);
        }
    }
    #pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
        #pragma GCC unroll 8
        for (int g = 0; g < kRegisters; ++g) {
            float* p = sums + t * kRows + g * kLanes;
            _mm256_store_ps(p, _mm256_add_ps(_mm256_load_ps(p), sum[t][g]));
        }
}

void float_block(const uint32_t* panel, int n_words, const float* tables, ptrdiff_t stride, int tokens, float* sums) {
    constexpr decltype(&float_tile<1, 2>) tiles[] = {nullptr,          float_tile<1, 4>, float_tile<2, 2>,
                                                     float_tile<3, 2>, float_tile<4, 2>, float_tile<5, 2>,
                                                     float_tile<6, 2>};
    for (int t = 0; t < tokens; t += kTileTokens) {
        const int n = tokens - t < kTileTokens ? tokens - t : kTileTokens;
        const int registers = n == 1 ? 4 : 2;
        for (int g = 0; g < kGroups; g += registers)
            tiles[n](panel + g * kLanes, n_words, tables + t * stride, stride, sums + t * kRows + g * kLanes);
    }
}

#include "avx2_xnor.inl"
#include "avx2_lookup.inl"
#include "avx2_screen.inl"

// 8 rows of 8 words -> 8 words of 8 rows.
void transpose_8x8(const uint32_t* words, ptrdiff_t stride, uint32_t* panel) {
    __m256i halves[8];  // rows r and r + 4 of words 0..3, then of words 4..7
    for (int r = 0; r < 4; ++r)
        #pragma GCC unroll 8
        for (int half = 0; half < 2; ++half) {
            const auto* top = reinterpret_cast<const __m128i*>(words + r * stride + 4 * half);
            const auto* bottom = reinterpret_cast<const __m128i*>(words + (r + 4) * stride + 4 * half);
            halves[4 * half + r] =
                _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(top)), _mm_loadu_si128(bottom), 1);
        }
    #pragma GCC unroll 8
    for (int half = 0; half < 2; ++half) {
        const __m256i* row = halves + 4 * half;
        const __m256i low01 = _mm256_unpacklo_epi32(row[0], row[1]), high01 = _mm256_unpackhi_epi32(row[0], row[1]);
        const __m256i low23 = _mm256_unpacklo_epi32(row[2], row[3]), high23 = _mm256_unpackhi_epi32(row[2], row[3]);
        const __m256i word[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                                 _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
        for (int w = 0; w < 4; ++w)
            _mm256_store_si256(reinterpret_cast<__m256i*>(panel + (4 * half + w) * kRows), word[w]);
    }
}

// Eight rows at a time, and the eight after them are fetched: a weight that comes from memory is read 15 % faster.
void transpose(const uint32_t* words, ptrdiff_t stride, int n_words, uint32_t* panel) {
    constexpr int kLineWords = 16;
    for (int r = 0; r < kRows; r += kLanes)
        for (int w = 0; w < n_words; w += kLoadWords) {
            for (int i = 0; w % kLineWords == 0 && i < kLanes; ++i)
                __builtin_prefetch(words + (r + kLanes + i) * stride + w);
            transpose_8x8(words + r * stride + w, stride, panel + w * kRows + r);
        }
}

}  // namespace

const KernelSet kAvx2 = {
    .name = "avx2",
    .transpose = transpose,
    .int8_block = int8_block,
    .chunk_words = kLanes,
    .int8_rows = int8_rows,
    .floats_per_word = 4 * kPairTables,
    .float_tables = float_tables,
    .float_block = float_block,
    .xnor_block = xnor_block,
    .salient_decode = salient_decode,
    .salient_sums = salient_sums,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
    .activations = kActivations,
    .screen_dots = screen_dots,
    .interleave = interleave,
    .lookup_bytes = kLookupBytes,
    .lookup_tables = lookup_tables,
    .lookup_panels = lookup_panels,
};

}  // namespace fbitrain
