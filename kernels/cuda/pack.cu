// Signs of floats to bits and back. Nothing here knows a float format beyond where its infinity lies.
//
// One warp takes CHUNK words of a row (1024 weights). Its loads and stores of weights touch 32 neighbouring elements at
// a time, those of words 32 neighbouring words. Both kernels do as little per byte as can be done: memory bounds them.
#include "common.cuh"

constexpr int WARPS = 8;    // per block
constexpr int CHUNK = WARP; // words per warp
constexpr int UNROLL = 8;   // loads under way per lane

// Where this warp works: the row and its first word; false if there is nothing left.
__device__ bool find_chunk(i64 rows, i32 n_words, i64& row, i32& first_word) {
    i32 chunks = ceil_div(n_words, CHUNK);
    i64 id = i64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    row = id / chunks;
    first_word = i32(id % chunks) * CHUNK;
    return row < rows;
}

// w >= 0 from the bits of w: everything from +0 to +infinity, and -0. Compared as floats, a negative denormal would be
// flushed to -0 and count as positive.
template <class Bits> __device__ bool is_positive(Bits bits, Bits infinity) {
    constexpr Bits minus_zero = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
    return bits <= infinity || bits == minus_zero;
}

template <class Bits> __device__ void pack_signs(const Bits* w, u32* words, i64 rows, i32 k, Bits infinity) {
    i64 row;
    i32 first_word, n_words = ceil_div(k, 32), lane = threadIdx.x % WARP;
    if (!find_chunk(rows, n_words, row, first_word)) return;
    i32 here = imin(CHUNK, n_words - first_word);
    const Bits* element = w + row * k + i64(first_word) * 32 + lane;
    i32 left = k - first_word * 32 - lane;  // elements from this lane's first one to the end of the row
    u32 mine = 0;                           // in the end: word `lane` of the chunk
    for (i32 start = 0; start < here; start += UNROLL) {
        bool positive[UNROLL];
#pragma unroll
        for (i32 i = 0; i < UNROLL; i++) {
            i32 at = (start + i) * 32;
            positive[i] = at < left && is_positive(element[at], infinity);
        }
#pragma unroll
        for (i32 i = 0; i < UNROLL; i++) {
            u32 word = __ballot_sync(ALL_LANES, positive[i]);
            if (lane == start + i) mine = word;
        }
    }
    if (lane < here) words[row * n_words + first_word + lane] = mine;
}

template <class Bits> __device__ void unpack_signs(const u32* words, Bits* signs, i64 rows, i32 k, Bits one) {
    constexpr Bits minus = Bits(Bits(1) << (8 * sizeof(Bits) - 1));
    i64 row;
    i32 first_word, n_words = ceil_div(k, 32), lane = threadIdx.x % WARP;
    if (!find_chunk(rows, n_words, row, first_word)) return;
    i32 here = imin(CHUNK, n_words - first_word);
    Bits* element = signs + row * k + i64(first_word) * 32 + lane;
    i32 left = k - first_word * 32 - lane;
    u32 mine = lane < here ? words[row * n_words + first_word + lane] : 0;
    for (i32 i = 0; i < here; i++) {
        u32 word = __shfl_sync(ALL_LANES, mine, i);
        if (i * 32 < left) element[i * 32] = word >> lane & 1 ? one : Bits(one | minus);
    }
}

#define PACK_KERNELS(name, Bits, infinity, one)                               \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP)                \
        pack_signs_##name(const Bits* w, u32* words, i64 rows, i32 k) {       \
        pack_signs<Bits>(w, words, rows, k, infinity);                        \
    }                                                                         \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP)                \
        unpack_signs_##name(const u32* words, Bits* signs, i64 rows, i32 k) { \
        unpack_signs<Bits>(words, signs, rows, k, one);                       \
    }

PACK_KERNELS(float16, u16, 0x7c00, 0x3c00)
PACK_KERNELS(bfloat16, u16, 0x7f80, 0x3f80)
PACK_KERNELS(float32, u32, 0x7f800000u, 0x3f800000u)
PACK_KERNELS(float64, u64, 0x7ff0000000000000ull, 0x3ff0000000000000ull)
