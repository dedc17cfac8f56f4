// xnor_gemm on the ordinary cores: product[m, n] = k - 2·popcount(a ^ b), for a few tokens, and for any number where
// the tensor cores have no use for bits.
//
// A warp takes one row of b and up to TOKENS rows of a: its lanes read b once, 16 bytes each where rows allow it, and a
// from the L1 cache. Bound: reading b, up to about 4 tokens; beyond that the popcounts, 16 a clock and SM.
#include "common.cuh"

constexpr int WARPS = 8;  // per block

template <int TOKENS>
__device__ void count_differing(i32 (&differing)[TOKENS], const u32* const (&a_rows)[TOKENS], const u32* b_row,
                                i32 n_words) {
    i32 lane = threadIdx.x % WARP;
    for (i32 w = lane; w < n_words; w += WARP) {
        u32 word = b_row[w];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) differing[t] += __popc(a_rows[t][w] ^ word);
    }
}

template <int TOKENS>
__device__ void count_differing_x4(i32 (&differing)[TOKENS], const u32* const (&a_rows)[TOKENS], const u32* b_row,
                                   i32 n_words) {
    i32 lane = threadIdx.x % WARP;
    for (i32 w = lane; w < n_words / 4; w += WARP) {
        uint4 words = reinterpret_cast<const uint4*>(b_row)[w];
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            uint4 tokens = reinterpret_cast<const uint4*>(a_rows[t])[w];
            differing[t] += __popc(tokens.x ^ words.x) + __popc(tokens.y ^ words.y) + __popc(tokens.z ^ words.z) +
                            __popc(tokens.w ^ words.w);
        }
    }
}

template <int TOKENS> __device__ void xnor_popc(const u32* a, const u32* b, i32* product, i32 m, i32 n, i32 k) {
    i32 n_words = ceil_div(k, 32), row = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= n) return;  // the whole warp
    const u32* b_row = b + i64(row) * n_words;
    bool wide = n_words % 4 == 0 && aligned16(a) && aligned16(b);
    for (i32 first = blockIdx.y * TOKENS; first < m; first += gridDim.y * TOKENS) {
        const u32* a_rows[TOKENS];
        i32 differing[TOKENS] = {};
#pragma unroll
        for (int t = 0; t < TOKENS; t++) a_rows[t] = a + i64(imin(first + t, m - 1)) * n_words;
        if (wide) count_differing_x4(differing, a_rows, b_row, n_words);
        else count_differing(differing, a_rows, b_row, n_words);
#pragma unroll
        for (int t = 0; t < TOKENS; t++) {
            i32 sum = warp_sum(differing[t]);
            if (threadIdx.x % WARP == 0 && first + t < m) product[i64(first + t) * n + row] = k - 2 * sum;
        }
    }
}

#define XNOR_POPC_KERNEL(tokens)                                                            \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP)                              \
        xnor_popc_##tokens(const u32* a, const u32* b, i32* product, i32 m, i32 n, i32 k) { \
        xnor_popc<tokens>(a, b, product, m, n, k);                                          \
    }

XNOR_POPC_KERNEL(1)
XNOR_POPC_KERNEL(2)
XNOR_POPC_KERNEL(4)
