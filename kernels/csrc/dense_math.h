// What a decoder computes besides its binary products: 16-bit and 32-bit floats times floats, norms, softmax, SwiGLU.
// As with KernelSet, a table of functions per instruction set; a level without a set of its own takes the one below.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace fbitrain {

enum Format { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };  // as in pack.inl

inline int64_t bytes_of(int format) { return format == kFloat32 ? 4 : 2; }

constexpr int kWidth = 32;  // columns per call of `product`

struct MathSet {
    // y = x / sqrt(mean of x^2 + epsilon) * weight, all [n].
    void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t n, float* y);

    // gate = silu(gate) * up, both [n].
    void (*swiglu)(const float* up, int64_t n, float* gate);

    // scores [n] = e^(factor * (scores - the largest of them)); returns their sum, by which softmax divides them.
    float (*powers)(float* scores, int64_t n, float factor);

    void (*to_float)(int format, const void* from, int64_t n, float* to);
    void (*to_half)(const float* from, int64_t n, uint16_t* to);

    // c[t][0 .. kWidth) = sum over i < k of a[t][i] * b[i][0 .. kWidth). b is float32 or float16. Strides are in
    // elements. A result does not depend on how many tokens share the call.
    void (*product)(int format, const float* a, ptrdiff_t a_stride, int64_t tokens, const void* b, ptrdiff_t b_stride,
                    int64_t k, float* c, ptrdiff_t c_stride);

    // y[r] = sum over i < k of rows[r][i] * x[i] for r < n_rows, for a weight that comes from memory; and the same for
    // the rows `apart`, 2 * apart and so on after each, kStreams in all, if apart is not 0. A row's result is the same.
    void (*dot_rows)(int format, const void* rows, int64_t apart, int64_t k, int64_t n_rows, const float* x, float* y);
};

extern const MathSet kMathPortable;
extern const MathSet kMathAvx2;
extern const MathSet kMathAvx512;

// The functions for a level that kernel_set has accepted.
const MathSet& math_set(int level);

}  // namespace fbitrain
