// xnor_gemm on the tensor cores, for more than a few tokens: product[m, n] = k - 2·popcount(a ^ b).
//
// popcount(a ^ b) = popcount(a) + popcount(b) - 2·popcount(a & b): the last is what the tensor cores sum, the first two
// are counted once per row by row_popcounts. Bits past k are 0 in both operands and add nothing, so neither do rows and
// words beyond the matrices, which are filled with zeros.
//
// A block computes BM × BN of the product in steps of STEP words along K. STAGES steps are under way at a time:
// cp.async copies rows of a and b into shared memory (a row every PITCH words, so that the 8 rows that ldmatrix reads
// together lie in different banks), while the warps multiply what has arrived.
#include "copy.cuh"
#include "mma.cuh"

constexpr int STEP = 16;        // words of a row per stage: 512 bits
constexpr int PITCH = STEP + 4; // words from row to row in shared memory
constexpr int STAGES = 3;
constexpr int FRAGMENT = 8;     // words of a row per tensor-core product: 256 bits

// Starts copying words [first_word, first_word + STEP) of rows [first_row, first_row + ROWS).
template <int ROWS, int VECTOR>  // VECTOR words per copy
__device__ void load_rows(u32* shared, const u32* words, i32 first_row, i32 rows, i32 first_word, i32 n_words) {
    for (i32 i = threadIdx.x; i < ROWS * STEP / VECTOR; i += blockDim.x) {
        i32 row = i / (STEP / VECTOR), word = i % (STEP / VECTOR) * VECTOR;
        bool inside = first_row + row < rows && first_word + word < n_words;
        const u32* from = inside ? words + i64(first_row + row) * n_words + first_word + word : words;
        cp_async<4 * VECTOR>(shared + row * PITCH + word, from, inside ? 4 * VECTOR : 0);
    }
}

// A warp's TM × TN tiles of 16 × 8: d += popcount(a & b) over 256 bits of fragments.
template <int TM, int TN>
__device__ void popc_of_and(i32 (&d)[TM][TN][4], const u32 (&a)[TM][4], const u32 (&b)[TN][2]) {
#if FBITRAIN_NATIVE_B1
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) mma_and_popc_16x8x256(d[i][j], a[i], b[j]);
#else
    // Bits as bytes 0 and 1: shifted by s, the four bytes of a word hold its bits s, 8 + s, 16 + s, 24 + s. The order
    // of the sum over K has changed, but for a and b alike, and fragments of 256 bits and of 32 bytes are the same.
#pragma unroll
    for (int s = 0; s < 8; s++) {
        u32 bytes_of_b[TN][2];
#pragma unroll
        for (int j = 0; j < TN; j++)
#pragma unroll
            for (int r = 0; r < 2; r++) bytes_of_b[j][r] = b[j][r] >> s & 0x01010101u;
#pragma unroll
        for (int i = 0; i < TM; i++) {
            u32 bytes_of_a[4];
#pragma unroll
            for (int r = 0; r < 4; r++) bytes_of_a[r] = a[i][r] >> s & 0x01010101u;
#pragma unroll
            for (int j = 0; j < TN; j++) mma_s8_16x8x32(d[i][j], bytes_of_a, bytes_of_b[j]);
        }
    }
#endif
}

// One stage: the warp's rows of a begin at `a`, those of b at `b`, both in shared memory.
template <int TM, int TN> __device__ void multiply_stage(i32 (&d)[TM][TN][4], const u32* a, const u32* b) {
    i32 lane = threadIdx.x % WARP;
    // ldmatrix: lanes 0–7 name rows 0–7, lanes 8–15 rows 8–15 (of a) or the next 4 words (of b), and so on.
    const u32* a_lane = a + (lane % 16) * PITCH + lane / 16 * 4;
    const u32* b_lane = b + (lane % 8) * PITCH + lane / 8 % 2 * 4;
#pragma unroll
    for (int word = 0; word < STEP; word += FRAGMENT) {
        u32 a_fragment[TM][4], b_fragment[TN][2];
#pragma unroll
        for (int i = 0; i < TM; i++) ldmatrix_x4(a_fragment[i], a_lane + i * 16 * PITCH + word);
#pragma unroll
        for (int j = 0; j < TN; j++) ldmatrix_x2(b_fragment[j], b_lane + j * 8 * PITCH + word);
        popc_of_and(d, a_fragment, b_fragment);
    }
}

// One tile's four values of this lane. Two neighbours are stored at once where n is even.
__device__ void store_tile(const i32 (&d)[4], const i32* a_counts, const i32* b_counts, i32* product, i32 first_row,
                           i32 first_column, i32 m, i32 n, i32 k) {
    i32 lane = threadIdx.x % WARP, column = first_column + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        i32 row = first_row + lane / 4 + 8 * half;
        if (row >= m || column >= n) continue;
        i32* at = product + i64(row) * n + column;
        i32 base = k - 2 * a_counts[row];
        i32 left = base - 2 * b_counts[column] + 4 * d[2 * half];
        if (column + 1 >= n) { at[0] = left; continue; }
        i32 right = base - 2 * b_counts[column + 1] + 4 * d[2 * half + 1];
        if (n % 2 == 0) *reinterpret_cast<int2*>(at) = {left, right};
        else { at[0] = left; at[1] = right; }
    }
}

// BM × BN by WARPS_M × WARPS_N warps; dynamic shared memory: STAGES · (BM + BN) · PITCH words.
template <int BM, int BN, int WARPS_M, int WARPS_N>
__device__ void xnor_tile(const u32* a, const u32* b, const i32* a_counts, const i32* b_counts, i32* product, i32 m,
                          i32 n, i32 k) {
    constexpr int TM = BM / WARPS_M / 16, TN = BN / WARPS_N / 8;
    DYNAMIC_SHARED(u32, stages);
    i32 n_words = ceil_div(k, 32), steps = ceil_div(n_words, STEP), warp = threadIdx.x / WARP;
    // Tiles are counted along one dimension of the grid, down a column first: the others hold 65535 at most.
    i32 tile = blockIdx.x, tiles_of_column = ceil_div(m, BM);
    i32 block_row = tile % tiles_of_column * BM, block_column = tile / tiles_of_column * BN;
    i32 warp_row = warp / WARPS_N * (BM / WARPS_M), warp_column = warp % WARPS_N * (BN / WARPS_N);
    bool wide = n_words % 4 == 0 && aligned16(a) && aligned16(b);

    auto load = [&](i32 step) {
        u32* stage = stages + step % STAGES * (BM + BN) * PITCH;
        if (step < steps && wide) {
            load_rows<BM, 4>(stage, a, block_row, m, step * STEP, n_words);
            load_rows<BN, 4>(stage + BM * PITCH, b, block_column, n, step * STEP, n_words);
        } else if (step < steps) {
            load_rows<BM, 1>(stage, a, block_row, m, step * STEP, n_words);
            load_rows<BN, 1>(stage + BM * PITCH, b, block_column, n, step * STEP, n_words);
        }
        cp_async_commit();  // also when there was nothing left, so that the groups can be counted
    };

    i32 d[TM][TN][4] = {};
    for (i32 step = 0; step < STAGES - 1; step++) load(step);
    for (i32 step = 0; step < steps; step++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // every thread's part has arrived, and nobody still reads the stage that is filled next
        load(step + STAGES - 1);
        const u32* stage = stages + step % STAGES * (BM + BN) * PITCH;
        multiply_stage(d, stage + warp_row * PITCH, stage + (BM + warp_column) * PITCH);
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < TM; i++)
#pragma unroll
        for (int j = 0; j < TN; j++)
            store_tile(d[i][j], a_counts, b_counts, product, block_row + warp_row + 16 * i,
                       block_column + warp_column + 8 * j, m, n, k);
}

extern "C" __global__ void __launch_bounds__(256)
    xnor_tile_128x128(const u32* a, const u32* b, const i32* a_counts, const i32* b_counts, i32* product, i32 m,
                      i32 n, i32 k) {
    xnor_tile<128, 128, 2, 4>(a, b, a_counts, b_counts, product, m, n, k);
}

extern "C" __global__ void __launch_bounds__(128)
    xnor_tile_16x64(const u32* a, const u32* b, const i32* a_counts, const i32* b_counts, i32* product, i32 m,
                    i32 n, i32 k) {
    xnor_tile<16, 64, 1, 4>(a, b, a_counts, b_counts, product, m, n, k);
}

// The set bits of each row, a warp a row.
extern "C" __global__ void row_popcounts(const u32* words, i32* counts, i32 rows, i32 n_words) {
    i32 row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (row >= rows) return;  // the whole warp
    i32 count = 0;
    for (i32 w = lane; w < n_words; w += WARP) count += __popc(words[i64(row) * n_words + w]);
    count = warp_sum(count);
    if (lane == 0) counts[row] = count;
}
