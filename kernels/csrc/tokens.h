// Activations made ready for the block functions, once per token.
#pragma once

#include "linear.h"
#include "threads.h"

namespace fbitrain {

struct Token {
    float scale;  // int8: what one step of the quantized values is worth
    float shift;  // column: sum of x * beta; row and tensor: sum of x
};

// The tokens of one slab, ready for the block functions.
struct Ready {
    Buffer<Token> tokens;
    Buffer<int8_t> quantized;  // [tokens][token_stride], in int8 mode
    Buffer<int32_t> totals;    // [tokens][groups]: sums of the quantized values
    Buffer<float> tables;      // [tokens][token_stride], in float mode
    Buffer<float> plain;       // [ceil(tokens / lanes)][k][lanes]: z or the quantized values, for salient weights
    Buffer<float> scratch;     // [threads][padded]
    int lanes;                 // 1 or 8 tokens side by side

    Ready(const Linear& p, int64_t count);
    const float* plain_tile(const Linear& p, int64_t tile) const { return plain.get() + tile * p.k * lanes; }
};

// Makes token `first + t` ready as number t of the slab; false if int8 mode finds NaN or infinity in it. `z` is scratch of
// p.padded() floats.
bool prepare(const Linear& p, int64_t first, int64_t t, float* z, Ready& ready);

// out[i] = sum over the experts, in their order, of gates[e] * alpha[e][begin + i], alpha [experts][width] rounded to x's
// dtype.
void mix(const Linear& p, const float* alpha, int64_t width, int64_t begin, int count, const float* gates, float* out);

}  // namespace fbitrain
