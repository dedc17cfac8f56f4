// What the parts of the CPU kernels share: the panel of transposed bits, and the table of functions that each
// instruction set fills in. No torch and nothing that needs more than C++17 with designated initialisers.
// docs/kernels.md explains the data paths.
//
// Letters: M tokens, N rows of the weight (out_features), K columns (in_features).
#pragma once

#include <cstddef>
#include <cstdint>

#define FBITRAIN_EXPORT __attribute__((visibility("default")))

namespace fbitrain {

constexpr int kWordBits = 32;    // columns per packed word
constexpr int kRows = 64;        // rows of a panel; a row is a SIMD lane
constexpr int kBlockWords = 16;  // words of a panel: 512 columns, whose nibbles of 64 rows (8 KiB) stay in the L1 cache
constexpr int kLoadWords = 8;  // `transpose` reads words by the eight; rows are padded to that with zeros
constexpr int kMaxTokens = 60;  // tokens per call of float_block and lookup_panels, and where there are groups
constexpr int kBlockTokens = 256;  // and of int8_block and xnor_block
constexpr int kDigits = 3;  // of a float in fixed point, each an int8 that is looked up as a token of its own
constexpr int kSalientLanes = 8;  // tokens side by side in salient_sums
constexpr int kSalientEntries = 512;  // entries per call: their int8 products add up to less than 2^24, exact in float
constexpr int kStreams = 4;  // rows of a head, far apart, that are read side by side
// A row of a screen's codes (head_screen.h) is blocks of kCodeColumns columns, filled up with zeros, kCodeBytes each:
// byte j < 32 of the m-th 32 bytes, m < 3, holds the code of column 32 * m + j in its low 6 bits, and in its high two
// bits 2 * m and 2 * m + 1 of the code of column 96 + j.
constexpr int kCodeColumns = 128;
constexpr int kCodeBytes = 96;
constexpr int64_t kMaxColumns = int64_t{1} << 24;  // 127 * K must fit in int32

// What the C functions return; the linear ones also return 1 + the number of the first token that cannot be quantized.
enum Status : int64_t { kOk = 0, kBadArgument = -1, kNoLevel = -2, kNoMemory = -3, kBadEntries = -4 };

struct SalientEntries {
    int32_t column[kSalientEntries];
    float value[kSalientEntries], sign[kSalientEntries];
};

// What becomes of x before and of the sums after the block functions: kActivations of activations.inl.
struct Activations {
    void (*scale_columns)(const void* x, bool bfloat16, const float* alpha, int64_t k, float* z);
    float (*sum_columns)(const void* x, bool bfloat16, const float* beta, int64_t k);
    float (*quantize)(const float* z, int64_t padded, int8_t* q);
    float (*split_digits)(const float* z, int64_t padded, int8_t* q);
    int32_t (*sum_quantized)(const int8_t* q, int64_t n);
    int32_t (*sum_magnitudes)(const int8_t* q, int64_t n);
    void (*finish_int8)(const int32_t* sums, int32_t total, float scale, const float* factor, float shift,
                        const float* beta, float* y);
};

// Functions of one instruction set. A panel is uint32 [n_words][kRows], 64-byte aligned. `sums` is [tokens][kRows] and
// is added to. Strides are in elements, from one token to the next.
struct KernelSet {
    const char* name;

    // words [kRows][stride] -> panel; n_words is a multiple of kLoadWords.
    void (*transpose)(const uint32_t* words, ptrdiff_t stride, int n_words, uint32_t* panel);

    // sums[t][r] += sum over the columns k whose bit is set in row r of x[t][k]. x is int8 in [-127, 127], in the order
    // [word][j][i] of column 32 * word + 8 * i + j, j < 8, i < 4: the order in which (panel >> j) & 0x01010101 yields
    // bits.
    void (*int8_block)(const uint32_t* panel, int n_words, const int8_t* x, ptrdiff_t stride, int tokens,
                       int32_t* sums);

    // sums[r] = sum over the columns k whose bit is set in row r of x[k], for few tokens and whole rows: no
    // transposing, and the weight is read in one stream. words [rows][n_words]; x in the order [chunk][j][w][i] of
    // column 32 * (chunk_words * chunk + w) + 8 * i + j, w < chunk_words, zeros past the row's end. Null where there is
    // none.
    int chunk_words;
    void (*int8_rows)(const uint32_t* words, int64_t n_words, int rows, const int8_t* x, int32_t* sums);

    // Floats of tables per word, and their making: z [32 * n_words] -> tables. What is in them is up to the set.
    int floats_per_word;
    void (*float_tables)(const float* z, int n_words, float* tables);

    // sums[t][r] += sum over k of z[t][k] where the bit is set and -z[t][k] where it is not.
    void (*float_block)(const uint32_t* panel, int n_words, const float* tables, ptrdiff_t stride, int tokens,
                        float* sums);

    // sums[t][r] += popcount(a[t] ^ row r). `nibbles` holds the 8 nibbles of each word of a, times 16, lowest first;
    // their stride is 8 * stride.
    void (*xnor_block)(const uint32_t* panel, int n_words, const uint32_t* a, const uint8_t* nibbles, ptrdiff_t stride,
                       int tokens, int32_t* sums);

    // Of n salient entries, whose columns are known: their values, int8 or float16, and the signs that the row's words
    // have at their columns, as floats.
    void (*salient_decode)(const void* values, bool float16, const uint32_t* words, int n, SalientEntries& entries);

    // For each lane, sums over i < n of value[i] * x[column[i]][lane] and of sign[i] * x[column[i]][lane]; x is
    // [columns][lanes], lanes is 1 or kSalientLanes.
    void (*salient_sums)(const SalientEntries& entries, int n, const float* x, int lanes, float* values, float* signs);

    // One row of k elements of a format (see pack.inl) -> ceil(k / 32) words, and back to +1 and -1.
    void (*pack_row)(int format, const void* w, int64_t k, uint32_t* words);
    void (*unpack_row)(int format, const uint32_t* words, int64_t k, void* out);

    Activations activations;

    // Of n_rows rows of a screened head (head_screen.h), sums[r] = sum over the columns of code * x, x [blocks][128];
    // and the same of the rows `apart`, 2 * apart and so on after each, kStreams in all, in sums[n_rows] onwards, if
    // apart is not 0.
    void (*screen_dots)(const uint8_t* codes, int64_t apart, int64_t blocks, int64_t n_rows, const int8_t* x,
                        int32_t* sums);

    // The sums of int8_block by lookups in tables, for x in [-128, 127]. Null where int8_block is as fast; not taken
    // from the level below. Panels must be interleaved: `interleave` puts the 256 bytes of each word of a panel into
    // another order, in place. `lookup_tables` makes the tables of one token from x as int8_block takes it,
    // lookup_bytes for each word; the flag that it returns belongs to the token's tables. `lookup_panels` takes tables
    // and flags of several tokens, any number of words, and one or two panels: two read a token's tables from memory
    // once for both. To each sum it adds what int8_block adds, and |x| of every column where x is negative: twice such
    // a sum less sum_magnitudes is the sum with signs. x and tables are 32-byte aligned. The order of the bytes and
    // what the tables hold are up to the set.
    void (*interleave)(uint32_t* panel, int n_words);
    int lookup_bytes;
    bool (*lookup_tables)(const int8_t* x, int n_words, uint8_t* tables);
    void (*lookup_panels)(const uint32_t* const* panels, int n_panels, int n_words, const uint8_t* tables,
                          ptrdiff_t stride, const bool* flags, int tokens, int32_t* const* sums);
};

// Each in the file of its name; other null functions are taken from the level below. The files hold no inline function
// or template that another file could share: the linker would keep one copy, perhaps the one that needs AVX-512, for
// all.
extern const KernelSet kPortable;
extern const KernelSet kAvx2;
extern const KernelSet kAvx512;
extern const KernelSet kAmx;

enum Level { kLevelPortable = 0, kLevelAvx2 = 1, kLevelAvx512 = 2, kLevelAmx = 3, kLevels = 4 };

// The highest level that this CPU and its operating system run, compiled or not.
int highest_level();

// The functions of a level, or null if it was not compiled or cannot run here.
const KernelSet* kernel_set(int level);

}  // namespace fbitrain
