// The kernels with AVX-512, VNNI, VPOPCNTDQ and GFNI: 16 rows of a panel per register. What is missing here (transpose)
// comes from the level below. docs/kernels.md draws the data paths.
#include <immintrin.h>

#include "activations.h"
#include "kernels.h"

namespace fbitrain {
namespace {

#include "activations.inl"
#include "pack.inl"
#include "salient.inl"

constexpr int kLanes = 16;
constexpr int kGroups = kRows / kLanes;  // registers that hold one word of every row
constexpr int kQuadTables = kWordBits / 4;  // float: one table of 16 sums per four columns

__m512i load(const void* p) { return _mm512_load_si512(p); }

void add_to(int32_t* sums, __m512i values) { _mm512_store_si512(sums, _mm512_add_epi32(load(sums), values)); }

// Has the compiler finish this sum before it starts on the next: see avx2.cpp.
template <typename Register>
void in_register([[maybe_unused]] Register& sum) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(sum));
#endif
}

// x of four columns, the same for all 16 rows.
__m512i four(const int8_t* x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, sizeof bytes);
    return _mm512_set1_epi32(bytes);
}

// One token and 32 rows. A bit is used where it stands: byte (bit << j) times x, so that two instructions (and,
// multiply-add of fours) do 64 weights. sum[j] holds 2^j times its value.
void int8_one_token(const uint32_t* panel, int n_words, const int8_t* x, int32_t* sums) {
    __m512i sum[2][8] = {};
    for (int w = 0; w < n_words; ++w)
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const __m512i x4 = four(x + w * kWordBits + 4 * j);
            const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(0x01010101u << j));
#pragma GCC unroll 2
            for (int g = 0; g < 2; ++g) {
                const __m512i bits = _mm512_and_si512(load(panel + w * kRows + g * kLanes), mask);
                sum[g][j] = _mm512_dpbusd_epi32(sum[g][j], bits, x4);
                in_register(sum[g][j]);
            }
        }
#pragma GCC unroll 2
    for (int g = 0; g < 2; ++g)
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) add_to(sums + g * kLanes, _mm512_sra_epi32(sum[g][j], _mm_cvtsi32_si128(j)));
}

// How far ahead of its use a weight is fetched, into the L2 cache: the L1 cache has too few requests under way for what
// the memory delivers. Measured: one thread reads 1.2 times as fast as with fetches into L1. Where rows are long it is
// the rows to be read together next that are fetched: what lies nearer has been read by then.
constexpr int64_t kWordsAhead = 1024;

// Bit j of each byte as a byte of 0 or 1: the matrix that vgf2p8affineqb multiplies bytes by has one row that is not
// zero.
__m512i bit_of_bytes(__m512i bytes, int j) {
    return _mm512_gf2p8affine_epi64_epi8(bytes, _mm512_set1_epi64(int64_t{1} << j << 56), 0);
}

// The sums of the lanes of four registers.
__m128i sum_lanes(const __m512i (&v)[4]) {
    __m512i pairs[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        pairs[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]),
                                    _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]));
    const __m512i quarters =
        _mm512_add_epi32(_mm512_unpacklo_epi64(pairs[0], pairs[1]), _mm512_unpackhi_epi64(pairs[0], pairs[1]));
    return _mm_add_epi32(_mm_add_epi32(_mm512_extracti32x4_epi32(quarters, 0), _mm512_extracti32x4_epi32(quarters, 1)),
                         _mm_add_epi32(_mm512_extracti32x4_epi32(quarters, 2), _mm512_extracti32x4_epi32(quarters, 3)));
}

constexpr int kRowsTogether = 4;

// One token and whole rows, kTogether at a time: a register holds 16 words of one row instead of one word of 16 rows,
// and what is loaded of x serves all rows. Each register is a cache line.
template <int kTogether>
void int8_together(const uint32_t* words, int64_t n_words, int rows, const int8_t* x, int32_t* sums) {
    const int64_t whole = n_words / kLanes * kLanes;
    const auto last = static_cast<__mmask16>((1 << (n_words - whole)) - 1);
    for (int row = 0; row < rows; row += kTogether, words += kTogether * n_words) {
        __m512i sum[kRowsTogether][2] = {};
        const auto add = [&](const __m512i(&bits)[kTogether], const int8_t* x_of_bits) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; ++j) {
                const __m512i x64 = load(x_of_bits + 64 * j);
#pragma GCC unroll 4
                for (int r = 0; r < kTogether; ++r) {
                    sum[r][j % 2] = _mm512_dpbusd_epi32(sum[r][j % 2], bit_of_bytes(bits[r], j), x64);
                    in_register(sum[r][j % 2]);
                }
            }
        };
        const uint32_t* far = words + (kTogether * n_words < kWordsAhead ? kWordsAhead : kTogether * n_words);
        __m512i bits[kTogether];
        for (int64_t w = 0; w < whole; w += kLanes) {
#pragma GCC unroll 4
            for (int r = 0; r < kTogether; ++r) {
                __builtin_prefetch(far + r * n_words + w, 0, 2);
                bits[r] = _mm512_loadu_si512(words + r * n_words + w);
            }
            add(bits, x + w * kWordBits);
        }
        if (last) {
#pragma GCC unroll 4
            for (int r = 0; r < kTogether; ++r) bits[r] = _mm512_maskz_loadu_epi32(last, words + r * n_words + whole);
            add(bits, x + whole * kWordBits);
        }
        __m512i totals[kRowsTogether];
#pragma GCC unroll 4
        for (int r = 0; r < kRowsTogether; ++r) totals[r] = _mm512_add_epi32(sum[r][0], sum[r][1]);
        const __m128i four = sum_lanes(totals);
        __builtin_memcpy(sums + row, &four, sizeof(int32_t) * kTogether);
    }
}

void int8_rows(const uint32_t* words, int64_t n_words, int rows, const int8_t* x, int32_t* sums) {
    const int whole = rows / kRowsTogether * kRowsTogether;
    int8_together<kRowsTogether>(words, n_words, whole, x, sums);
    int8_together<1>(words + whole * n_words, n_words, rows - whole, x, sums + whole);
}

// 32 rows x kTokens: one instruction does 64 weights; bringing the bits to bytes 0 and 1 is shared by the tokens.
template <int kTokens>
void int8_tile(const uint32_t* panel, int n_words, const int8_t* x, ptrdiff_t stride, int32_t* sums) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sum[kTokens][2] = {};
    for (int w = 0; w < n_words; ++w) {
        __m512i bits[2] = {load(panel + w * kRows), load(panel + w * kRows + kLanes)};
#pragma GCC unroll 1
        for (int j = 0; j < 8; ++j) {
            const __m512i bytes[2] = {_mm512_and_si512(bits[0], ones), _mm512_and_si512(bits[1], ones)};
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
                const __m512i x4 = four(x + t * stride + w * kWordBits + 4 * j);
#pragma GCC unroll 2
                for (int g = 0; g < 2; ++g) {
                    sum[t][g] = _mm512_dpbusd_epi32(sum[t][g], bytes[g], x4);
                    in_register(sum[t][g]);
                }
            }
#pragma GCC unroll 2
            for (int g = 0; g < 2; ++g) bits[g] = _mm512_srli_epi32(bits[g], 1);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
        for (int g = 0; g < 2; ++g) add_to(sums + t * kRows + g * kLanes, sum[t][g]);
}

void int8_block(const uint32_t* panel, int n_words, const int8_t* x, ptrdiff_t stride, int tokens, int32_t* sums) {
    constexpr int kTile = 8;
    constexpr decltype(&int8_tile<1>) tiles[] = {nullptr,      nullptr,      int8_tile<2>, int8_tile<3>, int8_tile<4>,
                                                 int8_tile<5>, int8_tile<6>, int8_tile<7>, int8_tile<8>};
    for (int g = 0; g < kGroups; g += 2)
        for (int t = 0; t < tokens; t += kTile) {
            const int n = tokens - t < kTile ? tokens - t : kTile;
            const uint32_t* rows = panel + g * kLanes;
            int32_t* out = sums + t * kRows + g * kLanes;
            if (n == 1)
                int8_one_token(rows, n_words, x + t * stride, out);
            else
                tiles[n](rows, n_words, x + t * stride, stride, out);
        }
}

// For four columns, the 16 sums that their bits can select; bit i of the index is the sign of column i, set for plus.
void float_tables(const float* z, int n_words, float* tables) {
    alignas(64) uint32_t flips[4][16];  // the sign bit, where the index has a zero
    for (int column = 0; column < 4; ++column)
        for (uint32_t i = 0; i < 16; ++i) flips[column][i] = (~i >> column & 1u) << 31;
    for (int quad = 0; quad < n_words * kQuadTables; ++quad) {
        __m512 sum = _mm512_setzero_ps();
        for (int column = 0; column < 4; ++column) {
            const __m512i value = _mm512_castps_si512(_mm512_set1_ps(z[4 * quad + column]));
            sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_xor_si512(value, load(flips[column]))));
        }
        _mm512_store_ps(tables + 16 * quad, sum);
    }
}

// 64 rows x kTokens: vpermps looks at the four lowest bits of each lane, so that a shift (shared by all tokens), a
// lookup and an add do 64 weights.
template <int kTokens>
void float_tile(const uint32_t* panel, int n_words, const float* tables, ptrdiff_t stride, float* sums) {
    __m512 sum[kTokens][kGroups] = {};
    for (int w = 0; w < n_words; ++w) {
        __m512i bits[kGroups];
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) bits[g] = load(panel + w * kRows + g * kLanes);
#pragma GCC unroll 1
        for (int quad = 0; quad < kQuadTables; ++quad) {
#pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
                const __m512 table = _mm512_load_ps(tables + t * stride + 16 * (w * kQuadTables + quad));
#pragma GCC unroll 8
                for (int g = 0; g < kGroups; ++g) {
                    sum[t][g] = _mm512_add_ps(sum[t][g], _mm512_permutexvar_ps(bits[g], table));
                    in_register(sum[t][g]);
                }
            }
#pragma GCC unroll 8
            for (int g = 0; g < kGroups; ++g) bits[g] = _mm512_srli_epi32(bits[g], 4);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) {
            float* p = sums + t * kRows + g * kLanes;
            _mm512_store_ps(p, _mm512_add_ps(_mm512_load_ps(p), sum[t][g]));
        }
}

void float_block(const uint32_t* panel, int n_words, const float* tables, ptrdiff_t stride, int tokens, float* sums) {
    constexpr int kTile = 5;
    constexpr decltype(&float_tile<1>) tiles[] = {nullptr,       float_tile<1>, float_tile<2>,
                                                  float_tile<3>, float_tile<4>, float_tile<5>};
    for (int t = 0; t < tokens; t += kTile) {
        const int n = tokens - t < kTile ? tokens - t : kTile;
        tiles[n](panel, n_words, tables + t * stride, stride, sums + t * kRows);
    }
}

// 64 rows x kTokens: three instructions (xor, popcount, add) do 512 bits.
template <int kTokens>
void xnor_tile(const uint32_t* panel, int n_words, const uint32_t* a, ptrdiff_t stride, int32_t* sums) {
    __m512i sum[kTokens][kGroups] = {};
    for (int w = 0; w < n_words; ++w)
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
            const __m512i word = _mm512_set1_epi32(static_cast<int32_t>(a[t * stride + w]));
#pragma GCC unroll 8
            for (int g = 0; g < kGroups; ++g) {
                const __m512i differing = _mm512_xor_si512(load(panel + w * kRows + g * kLanes), word);
                sum[t][g] = _mm512_add_epi32(sum[t][g], _mm512_popcnt_epi32(differing));
                in_register(sum[t][g]);
            }
        }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
        for (int g = 0; g < kGroups; ++g) add_to(sums + t * kRows + g * kLanes, sum[t][g]);
}

void xnor_block(const uint32_t* panel, int n_words, const uint32_t* a, const uint8_t*, ptrdiff_t stride, int tokens,
                int32_t* sums) {
    constexpr int kTile = 5;
    constexpr decltype(&xnor_tile<1>) tiles[] = {nullptr,      xnor_tile<1>, xnor_tile<2>,
                                                 xnor_tile<3>, xnor_tile<4>, xnor_tile<5>};
    for (int t = 0; t < tokens; t += kTile) {
        const int n = tokens - t < kTile ? tokens - t : kTile;
        tiles[n](panel, n_words, a + t * stride, stride, sums + t * kRows);
    }
}

// As in salient.inl, sixteen entries at a time by gathers.
__mmask16 first_lanes(int n) { return static_cast<__mmask16>(n >= kLanes ? 0xFFFF : (1 << n) - 1); }

void gather_signs(const void* values, bool float16, const uint32_t* words, int n, SalientEntries& entries) {
    decode_values(values, float16, n, entries);
    for (int i = 0; i < n; i += kLanes) {
        const __m512i column = _mm512_loadu_si512(entries.column + i);
        const __m512i word = _mm512_mask_i32gather_epi32(_mm512_set1_epi32(0), first_lanes(n - i),
                                                         _mm512_srli_epi32(column, 5), words, sizeof(uint32_t));
        // The entry's bit, moved to the top, is the opposite of a float's sign.
        const __m512i to_top = _mm512_andnot_si512(column, _mm512_set1_epi32(31));
        const __m512i bit = _mm512_and_si512(_mm512_sllv_epi32(word, to_top), _mm512_set1_epi32(INT32_MIN));
        _mm512_storeu_si512(entries.sign + i, _mm512_xor_si512(bit, _mm512_castps_si512(_mm512_set1_ps(-1.0f))));
    }
}

void gather_sums(const SalientEntries& entries, int n, const float* x, int lanes, float* values, float* signs) {
    if (lanes == kSalientLanes) return salient_sums_of_eight(entries, n, x, values, signs);
    __m512 value_sum = _mm512_setzero_ps(), sign_sum = _mm512_setzero_ps();
    for (int i = 0; i < n; i += kLanes) {
        const __mmask16 present = first_lanes(n - i);
        const __m512 at_column = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present,
                                                          _mm512_loadu_si512(entries.column + i), x, sizeof(float));
        const __m512 value = _mm512_maskz_loadu_ps(present, entries.value + i);
        const __m512 sign = _mm512_maskz_loadu_ps(present, entries.sign + i);
        value_sum = _mm512_add_ps(value_sum, _mm512_mul_ps(value, at_column));
        sign_sum = _mm512_add_ps(sign_sum, _mm512_mul_ps(sign, at_column));
    }
    values[0] = _mm512_reduce_add_ps(value_sum);
    signs[0] = _mm512_reduce_add_ps(sign_sum);
}

}  // namespace

const KernelSet kAvx512 = {
    .name = "avx512",
    .int8_block = int8_block,
    .chunk_words = kLanes,
    .int8_rows = int8_rows,
    .floats_per_word = 16 * kQuadTables,
    .float_tables = float_tables,
    .float_block = float_block,
    .xnor_block = xnor_block,
    .salient_decode = gather_signs,
    .salient_sums = gather_sums,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
    .activations = kActivations,
};

}  // namespace fbitrain
