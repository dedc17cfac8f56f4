// Products for many tokens, bound by the tensor cores: bits become signs in registers, activations pass through shared
// memory.
//
// A block computes 128 rows × 64 tokens, each of its 4 warps 32 rows × 64 tokens (half the rows where int8 sums are
// scaled by group, which takes twice the registers): the signs of a word, once made, are multiplied by 8 tiles of
// tokens, so that making them (2 to 3 instructions a register) hides behind the products. All warps share the
// activations, which arrive a step (128 columns) ahead by cp.async, in the order in which they will be read. Each bit
// of the weight is read from global memory once per 64 tokens, a chunk ahead.
#include "copy.cuh"
#include "linear_product.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;
constexpr int TOKEN_TILES = 8;  // of a block, and of each warp
constexpr int BLOCK_TOKENS = TOKEN_TILES * TILE_TOKENS;

// The activations of a step.
template <class F> constexpr int STAGE_QUADS = TOKEN_TILES * STEP_QUADS<F>;

// Starts copying the activations of one step; those of tokens that do not exist become zeros.
template <class F> __device__ void fetch(const Product& p, Quad* stage, int step) {
    const int first_tile = blockIdx.x * TOKEN_TILES, tiles = ceil_div(p.m, TILE_TOKENS), steps = p.chunks() * STEPS;
#pragma unroll
    for (int i = threadIdx.x; i < STAGE_QUADS<F>; i += THREADS) {
        const int tile = first_tile + i / STEP_QUADS<F>, token = tile * TILE_TOKENS + i % WARP / 4;
        const u64 at = (u64(imin(tile, tiles - 1)) * steps + step) * STEP_QUADS<F> + i % STEP_QUADS<F>;
        cp_async<16>(&stage[i], static_cast<const Quad*>(p.z) + at, token < p.m ? 16 : 0);
    }
}

// ROW_TILES: of a warp.
template <class F, bool GROUPS, int ROW_TILES> __device__ void prefill(const Product& p) {
    constexpr int WARP_ROWS = ROW_TILES * TILE_ROWS, BLOCK_ROWS = WARPS * WARP_ROWS;
    // Two stages, and in the end the sums, [BLOCK_TOKENS][PITCH] of 4 bytes. With this pitch the lanes of a warp write
    // their sums to different banks. cuda_linear_plan says how much that is.
    constexpr int PITCH = BLOCK_ROWS + 4;
    DYNAMIC_SHARED(Quad, shared);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, chunks = p.chunks(), n_words = p.n_words();
    const int first_row = blockIdx.y * BLOCK_ROWS + warp * WARP_ROWS;
    const bool wide = p.wide();
    int rows[2 * ROW_TILES];  // rows past the last one compute what it computes, and are not stored
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) rows[i] = imin(first_row + lane / 4 + 8 * i, p.n - 1);

    Tile<F, GROUPS, ROW_TILES, TOKEN_TILES> tile;
    Quad next[2 * ROW_TILES];
#pragma unroll
    for (int i = 0; i < 2 * ROW_TILES; i++) next[i] = load_words<F>(p.row(rows[i]), 0, n_words, wide);
    fetch<F>(p, shared, 0);
    cp_async_commit();
    for (int chunk = 0; chunk < chunks; chunk++) {
        Quad now[2 * ROW_TILES];
#pragma unroll
        for (int i = 0; i < 2 * ROW_TILES; i++) {
            now[i] = next[i];
            next[i] = load_words<F>(p.row(rows[i]), chunk + 1, n_words, wide);
        }
#pragma unroll 1  // 128 products of tensor cores are enough for one turn of a loop
        for (int step = 0; step < STEPS; step++) {
            const int done = chunk * STEPS + step;
            Quad* const stage = shared + step % 2 * STAGE_QUADS<F>;
            Quad* const other = shared + (step + 1) % 2 * STAGE_QUADS<F>;
            cp_async_wait<0>();
            __syncthreads();  // the step has arrived, and nobody reads the other stage any more
            if (done + 1 < chunks * STEPS) fetch<F>(p, other, done + 1);
            cp_async_commit();
            u32 words[2 * ROW_TILES];
#pragma unroll
            for (int i = 0; i < 2 * ROW_TILES; i++) {
                words[i] = now[i].word[0];
                now[i] = {now[i].word[1], now[i].word[2], now[i].word[3], 0};
            }
            tile.add(words, rows, p.group_scales(), chunk, step, {stage + lane, STEP_QUADS<F>, true});
        }
    }
    cp_async_wait<0>();
    __syncthreads();  // the stages have been read: the sums take their place
    using Total = typename Tile<F, GROUPS, ROW_TILES, TOKEN_TILES>::Total;
    Total* sums = reinterpret_cast<Total*>(shared);
#pragma unroll
    for (int i = 0; i < ROW_TILES * TOKEN_TILES * 4; i++) {
        const int e = i % 4, j = i / 4 % TOKEN_TILES, row_tile = i / 4 / TOKEN_TILES;
        const int row = warp * WARP_ROWS + row_tile * TILE_ROWS + lane / 4 + 8 * (e / 2);
        sums[(j * TILE_TOKENS + 2 * (lane % 4) + e % 2) * PITCH + row] = tile.total[row_tile][j][e];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < BLOCK_TOKENS * BLOCK_ROWS; i += THREADS) {
        const int token = blockIdx.x * BLOCK_TOKENS + i / BLOCK_ROWS, row = blockIdx.y * BLOCK_ROWS + i % BLOCK_ROWS;
        if (token < p.m && row < p.n) p.store(token, row, float(sums[i / BLOCK_ROWS * PITCH + i % BLOCK_ROWS]), 0.0f);
    }
}

#define PREFILL(name, F, GROUPS, ROW_TILES)                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) name(PRODUCT_PARAMETERS) { \
        prefill<F, GROUPS, ROW_TILES>(PRODUCT);                                         \
    }

PREFILL(prefill_float16, FloatSigns<f16>, false, 2)
PREFILL(prefill_bfloat16, FloatSigns<bf16>, false, 2)
PREFILL(prefill_int8, Int8Signs, false, 2)
PREFILL(prefill_int8_groups, Int8Signs, true, 1)
