// What every product kernel of binary_linear, mixture_linear and partial_linear is given, and how a sum becomes a
// result.
//
// A product kernel sums s = Σ ±z over a row, z being the activations that linear_prologue.cu has made. Then
//
//     y = (s·α[n] + salient)·token_scale[m] + token_shift[m]·β[n]          binary_linear, partial_linear
//     y = s·token_scale[m] · Σ gates[m, e]·alpha_out[e, n]                 mixture_linear
//
// where each part is left out if its pointer is null. α of scale "group" is inside s.
#pragma once
#include "linear_tile.cuh"

// Σ gates[e]·alpha[e, column] for alpha [n_experts, width], rounded after each operation: the int8 values that depend
// on it are defined to the bit.
__device__ inline float mixed(const float* gates, const float* alpha, int n_experts, int width, int column, int dtype) {
    float sum = __fmul_rn(gates[0], rounded(alpha[column], dtype));
    for (int e = 1; e < n_experts; e++)
        sum = __fadd_rn(sum, __fmul_rn(gates[e], rounded(alpha[u64(e) * width + column], dtype)));
    return sum;
}

struct Product {
    const void* z;              // activations, in the order that the kernel wants
    const u32* words;           // [N, ceil(K / 32)]
    void* y;                    // [M, N] of `dtype`
    const float* token_scale;   // [M], of int8 activations
    const float* token_shift;   // [M]: Σ x·β for scale "column", Σ x for "row" and "tensor"
    const float* alpha;         // [N], [1] or [N, K / group_size]; null for "column"
    const float* beta;          // [N] or [1]; null where β is 1
    const float* gates;         // [M, n_experts]
    const float* alpha_out;     // [n_experts, N]
    const i32* row_starts;      // [N + 1]; salient weights of row n: entries row_starts[n] .. row_starts[n + 1]
    const void* columns;        // of salient weights: u16 or i32
    const void* values;         // of salient weights: i8 or f16
    const float* value_scale;   // [N]; null with f16
    i32 m, n, k;
    i32 dtype;                  // of the activations as they came, and of y
    i32 alpha_stride;           // of alpha and beta: 1, or 0 for scale "tensor"
    i32 group_size;             // 0 unless scale is "group"
    i32 n_experts;
    i32 column_bytes, value_bytes;

    __device__ int n_words() const { return ceil_div(k, WORD); }
    __device__ int chunks() const { return ceil_div(k, CHUNK); }
    __device__ const u32* row(int row) const { return words + u64(row) * n_words(); }
    __device__ bool wide() const { return n_words() % 4 == 0 && aligned16(words); }
    __device__ GroupScales group_scales() const {
        return {alpha, group_size / WORD, group_size ? k / group_size : 1, dtype};
    }

    __device__ void store(int token, int row, float sum, float salient) const {
        float result = sum;
        if (alpha && !group_size) result *= rounded(alpha[row * alpha_stride], dtype);
        result += salient;
        if (token_scale) result *= token_scale[token];
        if (token_shift) result += token_shift[token] * (beta ? rounded(beta[row * alpha_stride], dtype) : 1.0f);
        if (gates) result *= mixed(gates + u64(token) * n_experts, alpha_out, n_experts, n, row, dtype);
        store_float(y, u64(token) * n + row, dtype, result);
    }
};

// The parameters of a product kernel, in the order of cuda_linear_plan: PRODUCT_TENSORS, then _launch's sizes.
#define PRODUCT_PARAMETERS                                                                                          \
    const void *z, const u32 *words, void *y, const float *token_scale, const float *token_shift, const float *alpha, \
        const float *beta, const float *gates, const float *alpha_out, const i32 *row_starts, const void *columns,    \
        const void *values, const float *value_scale, i32 m, i32 n, i32 k, i32 dtype, i32 alpha_stride,               \
        i32 group_size, i32 n_experts, i32 column_bytes, i32 value_bytes
#define PRODUCT                                                                                                      \
    Product {                                                                                                        \
        z, words, y, token_scale, token_shift, alpha, beta, gates, alpha_out, row_starts, columns, values,           \
            value_scale, m, n, k, dtype, alpha_stride, group_size, n_experts, column_bytes, value_bytes              \
    }
