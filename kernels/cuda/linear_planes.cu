// Products of int8 activations for few tokens, without unpacking a single bit, where tensor cores multiply bits
// (sm_80 to sm_90; elsewhere linear_decode.cu does it with int8).
//
// An int8 value is Σ bit_j·2^j, bit 7 counting -128. So Σ q over the columns whose weight bit is 1 is the sum over j of
// popcount(row & plane_j)·2^j: one AND-and-count of the weight with each of the token's 8 planes, which are the 8
// columns of the tensor cores' operand B (linear_planes.cuh). Then Σ ±q is twice that less Σ q. Exact.
//
// A block computes 16 rows; its warps take the chunks of K in turn. Lane (g, t) = (lane / 4, lane % 4) loads words
// 4t … 4t + 3 of rows g and g + 8 of a chunk, and of plane g. Which words an instruction takes as its 256 bits is free,
// as long as both operands agree: the first takes each lane's words 0 and 1, the second 2 and 3.
#include "linear_planes.cuh"
#include "linear_product.cuh"

constexpr int MAX_WARPS = 8;

// counts[token][e] += popcounts of row g + 8·(e / 2) and plane 2t + e % 2, over this warp's chunks.
template <int TOKENS>
__device__ void count_chunks(const Product& p, int first_row, int first_token, i32 (&counts)[TOKENS][4]) {
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP, chunks = p.chunks(), n_words = p.n_words();
    const u32* low_row = p.row(imin(first_row + lane / 4, p.n - 1));
    const u32* high_row = p.row(imin(first_row + lane / 4 + 8, p.n - 1));
    const bool wide = p.wide();
    for (int chunk = threadIdx.x / WARP; chunk < chunks; chunk += warps) {
        const Quad low = load_words<FloatSigns<f16>>(low_row, chunk, n_words, wide);
        const Quad high = load_words<FloatSigns<f16>>(high_row, chunk, n_words, wide);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            if (first_token + i >= p.m) break;
            const u64 at = plane_position(first_token + i, lane / 4, chunk * CHUNK_WORDS + lane % 4 * 4, chunks);
            const Quad plane = *reinterpret_cast<const Quad*>(static_cast<const u32*>(p.z) + at);
            mma_and_popc_16x8x256(counts[i], {low.word[0], high.word[0], low.word[1], high.word[1]},
                                  {plane.word[0], plane.word[1]});
            mma_and_popc_16x8x256(counts[i], {low.word[2], high.word[2], low.word[3], high.word[3]},
                                  {plane.word[2], plane.word[3]});
        }
    }
}

template <int TOKENS> __device__ void decode_planes(const Product& p, const i32* token_sum) {
    __shared__ u32 sums[MAX_WARPS][TOKENS][TILE_ROWS];  // unsigned: they may wrap around, the result then wraps back
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int first_row = blockIdx.y * TILE_ROWS, first_token = blockIdx.x * TOKENS;

    i32 counts[TOKENS][4] = {};
    count_chunks<TOKENS>(p, first_row, first_token, counts);
    const u32 even = 1u << 2 * (lane % 4), odd = lane % 4 == 3 ? 0u - 128u : 2 * even;  // weights of planes 2t, 2t + 1
#pragma unroll
    for (int i = 0; i < TOKENS; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 sum = u32(counts[i][2 * half]) * even + u32(counts[i][2 * half + 1]) * odd;
            sum += __shfl_xor_sync(ALL_LANES, sum, 1);
            sum += __shfl_xor_sync(ALL_LANES, sum, 2);
            if (lane % 4 == 0) sums[warp][i][lane / 4 + 8 * half] = sum;
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < TOKENS * TILE_ROWS; i += blockDim.x) {
        const int token = first_token + i / TILE_ROWS, row = first_row + i % TILE_ROWS;
        if (token >= p.m || row >= p.n) continue;
        u32 sum = 0;
        for (int w = 0; w < warps; w++) sum += sums[w][i / TILE_ROWS][i % TILE_ROWS];
        p.store(token, row, float(i32(2 * sum - u32(token_sum[token]))), 0.0f);
    }
}

#define PLANES_KERNEL(name, TOKENS)                                                                                   \
    extern "C" __global__ void __launch_bounds__(MAX_WARPS * WARP) name(PRODUCT_PARAMETERS, const i32* token_sum) {   \
        decode_planes<TOKENS>(PRODUCT, token_sum);                                                                    \
    }

PLANES_KERNEL(planes_1, 1)
PLANES_KERNEL(planes_8, 8)
