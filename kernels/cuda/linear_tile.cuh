// How tensor cores multiply activations by packed signs: shared by linear_decode.cu and linear_prefill.cu.
//
// A warp computes tiles of 16 weight rows × 8 tokens with the instructions of mma.cuh: A is made of signs, in
// registers, from the bits; B are activations. Which k a fragment's place stands for is free, as long as A and B
// agree, so it is chosen such that bits need no moving between lanes and B is loaded as 16 bytes per lane:
//
// - K is cut into chunks of 16 words (512 columns). In a chunk, lane (g, t) = (lane / 4, lane % 4) turns four words of
//   each of its rows g and g + 8 into signs, all 32 bits of them: its steps 0 to 3.
// - A word gives 32 / P registers of P signs each: register r holds bits r, r + 32/P, r + 2·32/P … Two 16-bit signs are
//   made by one shift and one three-input logic instruction, four int8 signs by a shift, a permute and an or.
// - linear_prologue.cu writes the activations in the matching order (`position`): per 8 tokens, chunk and step, 8 / P
//   times 32 lanes · 16 bytes, of which a warp's load takes 512 contiguous ones.
//
// Columns past K have activations 0, so whatever sign stands there adds nothing.
#pragma once
#include "linear_dtype.cuh"
#include "mma.cuh"

constexpr int WORD = 32;         // signs
constexpr int CHUNK_WORDS = 16;  // per row
constexpr int CHUNK = CHUNK_WORDS * WORD;
constexpr int STEPS = 4;         // words that one lane takes from a row's chunk
constexpr int TILE_TOKENS = 8;
constexpr int TILE_ROWS = 16;

struct __align__(16) Quad { u32 word[4]; };

// PTX prmt. Byte i of the result is the byte of {a, b} that nibble i of the selector names; with the nibble's bit 3
// set, all its bits are that byte's sign.
__device__ inline u32 permute_bytes(u32 a, u32 b, u32 selector) {
#ifdef SIMT_HOST
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
        const u32 nibble = selector >> 4 * i & 15, byte = ((u64(b) << 32 | a) >> 8 * (nibble & 7)) & 255;
        result |= (nibble < 8 ? byte : byte >= 128 ? 255u : 0u) << 8 * i;
    }
    return result;
#else
    u32 result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
    return result;
#endif
}

// Signs as 16-bit floats of type T, for activations of that type.
template <class T> struct FloatSigns {
    using Element = T;
    using Sum = float;
    static constexpr int PER_REGISTER = 2;

    // Each lane takes four neighbouring words of the chunk: one load of 16 bytes.
    static constexpr bool WIDE = true;

    // ±scale. A bit is shifted into each half's sign; 1 means plus, so `unit` is -scale twice (see `unit`).
    __device__ static u32 signs(u32 word, int r, u32 unit) { return (word << (15 - r) & 0x80008000u) ^ unit; }

    __device__ static u32 unit(float scale) {
        const T value = from_float<T>(scale);
        return pair(value, value) ^ 0x80008000u;
    }

    __device__ static void multiply(float (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        mma_16x8x16<T>(sums, a, b);
    }
};

// Signs as int8, for quantized activations. A scale cannot be part of them.
struct Int8Signs {
    using Element = i8;
    using Sum = i32;
    static constexpr int PER_REGISTER = 4;

    // The four lanes of a row take neighbouring words, so that a step is 128 neighbouring columns: mostly one group.
    static constexpr bool WIDE = false;

    // A bit of the inverted word is shifted into each byte's sign and replicated: 0 or -1; the or makes that 1 or -1.
    __device__ static u32 signs(u32 word, int r, u32) {
        return permute_bytes(~word << (7 - r), 0, 0xba98) | 0x01010101u;
    }

    __device__ static u32 unit(float) { return 0; }

    __device__ static void multiply(i32 (&sums)[4], const u32 (&a)[4], const u32 (&b)[2]) {
        mma_s8_16x8x32(sums, a, b);
    }
};

// Loads of 16 bytes that a lane makes for a word's activations.
template <class F> constexpr int QUADS = 8 / F::PER_REGISTER;

// Quads of a tile's step, all 32 lanes together.
template <class F> constexpr int STEP_QUADS = QUADS<F> * WARP;

// Which word of a chunk lane t of a row takes in a step.
template <class F> __device__ constexpr int word_in_chunk(int t, int step) {
    return F::WIDE ? 4 * t + step : 4 * step + t;
}

// Where element k of a token lies among the activations; `chunks` = ceil(K / 512).
template <class F> __device__ inline u64 position(int token, int k, int chunks) {
    constexpr int P = F::PER_REGISTER, REGISTERS = WORD / P;
    const int word = k % CHUNK / WORD, bit = k % WORD, r = bit % REGISTERS;
    const int t = F::WIDE ? word / 4 : word % 4, step = F::WIDE ? word % 4 : word / 4;
    const u64 tile_step = (u64(token / TILE_TOKENS) * chunks + k / CHUNK) * STEPS + step;
    const u64 quad = (tile_step * QUADS<F> + r / 4) * WARP + token % TILE_TOKENS * 4 + t;
    return quad * (4 * P) + r % 4 * P + bit / REGISTERS;
}

// How far the same column of a tile's next token is.
template <class F> constexpr int TOKEN_STRIDE = 4 * 4 * F::PER_REGISTER;

// The four words that lane t of a row feeds in a chunk, 0 past the row's end. `wide`: rows are aligned to 16 bytes.
template <class F> __device__ inline Quad load_words(const u32* row, int chunk, int n_words, bool wide) {
    const int t = threadIdx.x % 4, base = chunk * CHUNK_WORDS;
    Quad words = {};
    if (F::WIDE && wide) {
        if (base + 4 * t < n_words) words = *reinterpret_cast<const Quad*>(row + base + 4 * t);
        return words;
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const int word = base + word_in_chunk<F>(t, step);
        if (word < n_words) words.word[step] = row[word];
    }
    return words;
}

// α of scale "group", fp32 [N, K / group_size], and the dtype in which it takes part.
struct GroupScales {
    const float* alpha;
    int group_words, per_row, dtype;

    // Words past the row's end have some scale too; it meets only zeros.
    __device__ float of(int row, int word) const {
        return rounded(alpha[u64(row) * per_row + imin(word / group_words, per_row - 1)], dtype);
    }
};

// A step's activations, for this lane: its first quad of token tile 0, each further tile `stride` quads on. Lanes whose
// token does not exist have none.
struct Activations {
    const Quad* first;
    int stride;
    bool there;
};

// A warp's sums of 16·ROW_TILES rows × 8·TOKEN_TILES tokens. `total[i][j][e]` is row 16i + g + 8·(e / 2), token
// 8j + 2t + e % 2. It contains the groups' scales, if there are any. FloatSigns carry them; integer sums must be scaled
// step by step, which is what GROUPS is for.
template <class F, bool GROUPS, int ROW_TILES, int TOKEN_TILES> struct Tile {
    using Sum = typename F::Sum;
    template <bool, class A, class B> struct Either { using Type = A; };
    template <class A, class B> struct Either<false, A, B> { using Type = B; };
    using Total = typename Either<GROUPS, float, Sum>::Type;

    Total total[ROW_TILES][TOKEN_TILES][4] = {};

    // Adds one step of a chunk. words[2i + h]: this lane's word of row 16i + g + 8h, whose number in the weight is
    // rows[2i + h].
    __device__ void add(const u32 (&words)[2 * ROW_TILES], const int (&rows)[2 * ROW_TILES], GroupScales scales,
                        int chunk, int step, Activations z) {
        const int base = chunk * CHUNK_WORDS, t = threadIdx.x % 4;
        if constexpr (!GROUPS) {
            u32 units[2 * ROW_TILES];
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++)
                units[i] = F::unit(scales.group_words ? scales.of(rows[i], base + word_in_chunk<F>(t, step)) : 1.0f);
            multiply(total, words, units, z, true);
        } else if (scales.group_words % 4 == 0) {
            add_scaled(words, rows, scales, base + 4 * step, z, true);
        } else {  // the four lanes of a row hold words of different groups: one after the other
            for (int turn = 0; turn < 4; turn++) add_scaled(words, rows, scales, base + 4 * step + turn, z, t == turn);
        }
    }

    // Integer sums of the lanes that are `mine`, which all belong to the group of `word`, times their rows' scales.
    __device__ void add_scaled(const u32 (&words)[2 * ROW_TILES], const int (&rows)[2 * ROW_TILES], GroupScales scales,
                               int word, Activations z, bool mine) {
        Sum sums[ROW_TILES][TOKEN_TILES][4] = {};
        const u32 units[2 * ROW_TILES] = {};
        multiply(sums, words, units, z, mine);
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float alpha = scales.of(rows[2 * i + half], word);
#pragma unroll
                for (int j = 0; j < TOKEN_TILES; j++) {
                    total[i][j][2 * half] += alpha * float(sums[i][j][2 * half]);
                    total[i][j][2 * half + 1] += alpha * float(sums[i][j][2 * half + 1]);
                }
            }
        }
    }

    // sums += signs · activations. Lanes that are not `mine` contribute zeros.
    template <class S>
    __device__ static void multiply(S (&sums)[ROW_TILES][TOKEN_TILES][4], const u32 (&words)[2 * ROW_TILES],
                                    const u32 (&units)[2 * ROW_TILES], Activations z, bool mine) {
#pragma unroll
        for (int q = 0; q < QUADS<F>; q++) {
            u32 a[ROW_TILES][2][4];  // two instructions' worth
#pragma unroll
            for (int i = 0; i < ROW_TILES * 8; i++) {
                const int e = i % 4, row = i / 8 * 2 + e % 2, r = 4 * q + i / 4 % 2 * 2 + e / 2;
                a[i / 8][i / 4 % 2][e] = mine ? F::signs(words[row], r, units[row]) : 0;
            }
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; j++) {
                const Quad b = z.there ? z.first[j * z.stride + q * WARP] : Quad{};
#pragma unroll
                for (int i = 0; i < ROW_TILES; i++) {
                    F::multiply(sums[i][j], a[i][0], {b.word[0], b.word[1]});
                    F::multiply(sums[i][j], a[i][1], {b.word[2], b.word[3]});
                }
            }
        }
    }
};
