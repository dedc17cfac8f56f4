// Products for few tokens, which are bound by reading the weight: every bit is read once, in loads of 16 bytes. The
// kernels are in linear_decode.cu and, with salient weights, in linear_partial.cu.
//
// A block computes 16 rows × 8 tokens. Its warps take the chunks of K in turn, so that much of a row is under way at
// once, and add up their sums in shared memory. A lane makes a word's 32 signs for 16-bit activations in 32
// instructions, half of them shifts that the compiler turns into multiplications, which have their own pipeline: on
// an A100 that is less time than memory takes to deliver the word, on an H100 about as much.
//
// Activations come straight from L2, those of tokens that exist only; all blocks read the same ones.
#pragma once
#include "linear_salient.cuh"

constexpr int MAX_WARPS = 8;

// A block's results; token * TILE_ROWS + row is the place of one.
constexpr int RESULTS = TILE_TOKENS * TILE_ROWS;

// This warp's share of the block's sums.
template <class F, bool GROUPS>
__device__ void sum_chunks(const Product& p, int first_row, int token_tile, Tile<F, GROUPS, 1, 1>& tile) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP, chunks = p.chunks(), n_words = p.n_words();
    // Rows past the last one compute what it computes, and are not stored.
    const int rows[2] = {imin(first_row + lane / 4, p.n - 1), imin(first_row + lane / 4 + 8, p.n - 1)};
    const bool wide = p.wide();
    const Quad* z = static_cast<const Quad*>(p.z) + u64(token_tile) * chunks * STEPS * STEP_QUADS<F> + lane;
    const bool there = token_tile * TILE_TOKENS + lane / 4 < p.m;
    for (int chunk = threadIdx.x / WARP; chunk < chunks; chunk += warps) {
        const Quad low = load_words<F>(p.row(rows[0]), chunk, n_words, wide);
        const Quad high = load_words<F>(p.row(rows[1]), chunk, n_words, wide);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
            tile.add({low.word[step], high.word[step]}, rows, p.group_scales(), chunk, step,
                     {z + (chunk * STEPS + step) * STEP_QUADS<F>, 0, there});
    }
}

// What the block's salient weights add, a row per warp at a time.
template <class F, class S>
__device__ void sum_salient(const Product& p, int first_row, int first_token, S (&signs)[RESULTS],
                            float (&values)[RESULTS]) {
    const auto* z = static_cast<const typename F::Element*>(p.z);
    const auto column = [&](int c) { return z + position<F>(first_token, c, p.chunks()); };
    const int tokens = imin(TILE_TOKENS, p.m - first_token), warps = blockDim.x / WARP;
    for (int r = threadIdx.x / WARP; r < TILE_ROWS && first_row + r < p.n; r += warps) {
        Salient<S, TILE_TOKENS> salient;
        salient.template sum_row<typename F::Sum>(p, first_row + r, tokens, column, TOKEN_STRIDE<F>);
        if (threadIdx.x % WARP) continue;
#pragma unroll
        for (int token = 0; token < TILE_TOKENS; token++) {
            signs[token * TILE_ROWS + r] = salient.signs[token];
            values[token * TILE_ROWS + r] = salient.values[token];
        }
    }
}

template <class F, bool GROUPS, bool SALIENT> __device__ void decode(const Product& p) {
    using Total = typename Tile<F, GROUPS, 1, 1>::Total;
    __shared__ Total sums[MAX_WARPS][RESULTS];
    __shared__ Total salient_signs[SALIENT ? RESULTS : 1];
    __shared__ float salient_values[SALIENT ? RESULTS : 1];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int first_row = blockIdx.y * TILE_ROWS, first_token = blockIdx.x * TILE_TOKENS;

    Tile<F, GROUPS, 1, 1> tile;
    sum_chunks<F, GROUPS>(p, first_row, blockIdx.x, tile);
#pragma unroll
    for (int e = 0; e < 4; e++)
        sums[warp][(2 * (lane % 4) + e % 2) * TILE_ROWS + lane / 4 + 8 * (e / 2)] = tile.total[0][0][e];

    if constexpr (SALIENT) sum_salient<F>(p, first_row, first_token, salient_signs, salient_values);
    __syncthreads();

    for (int i = threadIdx.x; i < RESULTS; i += blockDim.x) {
        const int token = first_token + i / TILE_ROWS, row = first_row + i % TILE_ROWS;
        if (token >= p.m || row >= p.n) continue;
        Total sum = sums[0][i];
        for (int w = 1; w < warps; w++) sum += sums[w][i];
        if constexpr (SALIENT) p.store(token, row, float(sum - salient_signs[i]), salient_values[i]);
        else p.store(token, row, float(sum), 0.0f);
    }
}

// The kernels NAME_float16, NAME_bfloat16, NAME_int8, NAME_int8_groups.
#define DECODE_KERNEL(name, F, GROUPS, SALIENT)                                               \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS * WARP) name(PRODUCT_PARAMETERS) { \
        decode<F, GROUPS, SALIENT>(PRODUCT);                                                  \
    }
#define DECODE_KERNELS(name, SALIENT)                                   \
    DECODE_KERNEL(name##_float16, FloatSigns<f16>, false, SALIENT)      \
    DECODE_KERNEL(name##_bfloat16, FloatSigns<bf16>, false, SALIENT)    \
    DECODE_KERNEL(name##_int8, Int8Signs, false, SALIENT)               \
    DECODE_KERNEL(name##_int8_groups, Int8Signs, true, SALIENT)
