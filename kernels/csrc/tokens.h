// Activations made ready for the block functions, once per token.
#pragma once

#include "linear.h"
#include "threads.h"

namespace fbitrain {

struct Token {
    float scale;  // int8 and digits: what one step of the last digit is worth
    float shift;  // column: sum of x * beta; row and tensor: sum of x
};

// What tokens are turned into: the operand of the function of this name.
enum class Form { kInt8Rows, kInt8Block, kLookupPanels, kFloatBlock };

// A token of int8 is a row of the operand; one of floats, in lookups, is kDigits rows, the last digit first.

// How the tokens of a product are made ready.
struct Plan {
    Form form;
    int64_t stride;  // from one row to the next, in elements
    int64_t slab;    // tokens made ready at a time, which bounds the memory
    int64_t block;   // and of these, tokens multiplied at a time
    int rows = 1;    // of a token
};

Plan plan_tokens(const Linear& p);

// The tokens of one slab, ready for the block functions.
struct Ready {
    Plan plan;
    Buffer<Token> tokens;
    Buffer<int32_t> totals;    // [tokens * rows][groups]: what twice the sums of the block function are too large by
    Buffer<bool> flags;        // [tokens * rows], of lookup_tables
    Buffer<int8_t> quantized;  // [tokens * rows][stride]: one of these three, by the plan's form
    Buffer<uint8_t> lookups;
    Buffer<float> tables;
    Buffer<float> plain;       // [ceil(tokens / lanes)][k][lanes]: z or the quantized values, for salient weights
    Buffer<float> scratch;     // [threads][scratch_of]
    int lanes;                 // 1 or 8 tokens side by side

    Ready(const Linear& p, const Plan& plan);
    // Digits are not made in place.
    int64_t scratch_of(const Linear& p) const { return p.padded() * (plan.rows == 1 ? 1 : 2); }
    const float* plain_tile(const Linear& p, int64_t tile) const { return plain.get() + tile * p.k * lanes; }
};

// Makes token `first + t` ready as number t of the slab; false if int8 mode finds NaN or infinity in it, or if it
// cannot be put in digits. `z` is scratch of ready.scratch_of(p) floats, 64-byte aligned.
bool prepare(const Linear& p, int64_t first, int64_t t, float* z, Ready& ready);

// out[i] = sum over the experts, in their order, of gates[e] * alpha[e][begin + i], alpha [experts][width] rounded to
// x's dtype.
void mix(const Linear& p, const float* alpha, int64_t width, int64_t begin, int count, const float* gates, float* out);

}  // namespace fbitrain
