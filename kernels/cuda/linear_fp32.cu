// Products of fp32 activations, for any number of tokens: exact signs, fp32 sums, no tensor cores. Every weight is a
// multiply-add by ±1, so the bound is the arithmetic, not memory.
//
// A warp computes 4 rows × TOKENS tokens. A lane takes one word of a span of 32 (linear_fp32.cuh): a row's words are
// one load of 128 bytes for the warp, and each sign, once made, serves TOKENS multiply-adds.
#include "linear_fp32.cuh"
#include "linear_salient.cuh"

constexpr int WARPS = 8;
constexpr int ROWS = 4;  // of a warp

// sums[r][i] += this lane's part of one span, times the group's scale if there are groups.
template <int TOKENS>
__device__ void add_span(const Product& p, const int (&rows)[ROWS], const Floats* (&z)[TOKENS], int span,
                         float (&sums)[ROWS][TOKENS]) {
    const int word = span * WARP + threadIdx.x % WARP, n_words = p.n_words();
    float span_sums[ROWS][TOKENS] = {};
    u32 inverted[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) inverted[r] = word < n_words ? ~p.row(rows[r])[word] : 0;
#pragma unroll
    for (int four = 0; four < 8; four++) {
        Floats x[TOKENS];
#pragma unroll
        for (int i = 0; i < TOKENS; i++) x[i] = z[i][(span * 8 + four) * WARP];
#pragma unroll
        for (int e = 0; e < ROWS * 4; e++) {
            const int r = e / 4, bit = 4 * four + e % 4;
            const float sign = __uint_as_float((inverted[r] << (31 - bit) & 0x80000000u) | 0x3f800000u);
#pragma unroll
            for (int i = 0; i < TOKENS; i++) span_sums[r][i] = fmaf(sign, x[i].at[e % 4], span_sums[r][i]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const float scale = p.group_size ? p.group_scales().of(rows[r], word) : 1.0f;
#pragma unroll
        for (int i = 0; i < TOKENS; i++) sums[r][i] += scale * span_sums[r][i];
    }
}

template <int TOKENS> __device__ void product_fp32(const Product& p) {
    const int lane = threadIdx.x % WARP, first_token = blockIdx.x * TOKENS, spans = ceil_div(p.k, SPAN);
    const int first_row = (blockIdx.y * WARPS + threadIdx.x / WARP) * ROWS;
    const Floats* z[TOKENS];
#pragma unroll
    for (int i = 0; i < TOKENS; i++)  // tokens and rows past the last one repeat it, and are not stored
        z[i] = static_cast<const Floats*>(p.z) + u64(imin(first_token + i, p.m - 1)) * spans * (SPAN / 4) + lane;
    int rows[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) rows[r] = imin(first_row + r, p.n - 1);

    float sums[ROWS][TOKENS] = {};
    for (int span = 0; span < spans; span++) add_span<TOKENS>(p, rows, z, span, sums);

    const auto column = [&](int c) { return static_cast<const float*>(p.z) + fp32_position(first_token, c, spans); };
    // From here on, lane r·TOKENS + i speaks for row r and token i.
    float sum = 0, salient_value = 0;
#pragma unroll
    for (int j = 0; j < ROWS * TOKENS; j++) {
        const float total = warp_sum(sums[j / TOKENS][j % TOKENS]);
        if (lane == j) sum = total;
    }
    for (int r = 0; p.row_starts && r < ROWS; r++) {
        Salient<float, TOKENS> salient;
        const int row = imin(first_row + r, p.n - 1), tokens = imin(TOKENS, p.m - first_token);
        salient.template sum_row<float>(p, row, tokens, column, spans * SPAN);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) {
            if (lane != r * TOKENS + i) continue;
            sum -= salient.signs[i];
            salient_value = salient.values[i];
        }
    }
    const int row = first_row + lane / TOKENS, token = first_token + lane % TOKENS;
    if (lane < ROWS * TOKENS && row < p.n && token < p.m) p.store(token, row, sum, salient_value);
}

#define FP32(name, TOKENS)                                                             \
    extern "C" __global__ void __launch_bounds__(WARPS * WARP) name(PRODUCT_PARAMETERS) { \
        product_fp32<TOKENS>(PRODUCT);                                                  \
    }

FP32(fp32_1, 1)
FP32(fp32_4, 4)
