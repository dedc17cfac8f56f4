// The salient weights of partial_linear: what they add to a row's sum, and what their sign bits have wrongly added.
#pragma once
#include "linear_product.cuh"

__device__ inline i32 as_number(i8 z) { return z; }
template <class T> __device__ inline float as_number(T z) { return to_float(z); }

// What products of two values of type V are summed in: those of 2^24 int8 values exceed int32.
template <class V> struct WideOf { using Type = V; };
template <> struct WideOf<i32> { using Type = i64; };
template <class V> using Wide = typename WideOf<V>::Type;

// For one row and TOKENS tokens: `values` = Σ value·z·value_scale, to be added to the result, and `signs` = Σ ±z, to be
// taken out of the row's sum (S is float and the signs carry the group's α where that sum does).
template <class S, int TOKENS> struct Salient {
    float values[TOKENS];
    S signs[TOKENS];

    // By a whole warp, for the first `tokens` tokens. `z_of(column)` points to the first token's activation, `stride`
    // elements before the next one's. Z is i32 or float: the type of activations, in which int8 values are multiplied;
    // float16 values are multiplied in float.
    template <class Z, class Column>
    __device__ void sum_row(const Product& p, int row, int tokens, Column z_of, int stride) {
        if (p.value_bytes == 1) sum_entries<Z>(p, row, tokens, z_of, stride);
        else sum_entries<float>(p, row, tokens, z_of, stride);
    }

    template <class V, class Column>
    __device__ void sum_entries(const Product& p, int row, int tokens, Column z_of, int stride) {
        Wide<V> value_sums[TOKENS] = {};
        S sign_sums[TOKENS] = {};
        for (int entry = p.row_starts[row] + int(threadIdx.x % WARP); entry < p.row_starts[row + 1]; entry += WARP) {
            const int column = p.column_bytes == 2 ? int(static_cast<const u16*>(p.columns)[entry])
                                                   : static_cast<const i32*>(p.columns)[entry];
            const V value = p.value_bytes == 1 ? V(static_cast<const i8*>(p.values)[entry])
                                               : V(to_float(static_cast<const f16*>(p.values)[entry]));
            S sign = p.row(row)[column / WORD] >> column % WORD & 1 ? S(1) : S(-1);
            if (p.group_size) sign *= S(p.group_scales().of(row, column / WORD));
            const auto* z_column = z_of(column);
#pragma unroll
            for (int token = 0; token < TOKENS; token++) {
                if (token >= tokens) break;
                const auto z = as_number(z_column[token * stride]);
                value_sums[token] += value * V(z);
                sign_sums[token] += sign * S(z);
            }
        }
        const float scale = p.value_scale ? p.value_scale[row] : 1.0f;
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            values[token] = float(warp_sum(value_sums[token])) * scale;
            signs[token] = warp_sum(sign_sums[token]);
        }
    }
};
