// One product with a binary weight, described: what binary_linear.cpp computes and others call.
#pragma once

#include "activations.h"
#include "kernels.h"
#include "panel.h"

namespace fbitrain {

enum Mode { kFloatMode = 0, kInt8Mode = 1 };
enum Scale { kColumn = 0, kRow = 1, kTensor = 2, kGroup = 3 };

// Token-dependent scales: x is multiplied with gates·alpha_in and the result with gates·alpha_out.
struct Mixture {
    const float* gates;  // [m][experts]
    const float *alpha_in, *alpha_out;  // [experts][k] and [experts][n]
    int64_t experts;
};

// Weights that are no bits: those of row n are the entries row_starts[n] .. row_starts[n + 1], columns ascending. A
// weight is its int8 value times value_scale[n], or its float16 value where there is no value_scale.
struct Salient {
    const int32_t* row_starts;  // [n + 1]
    const void *columns, *values;
    const float* value_scale;
    bool wide;  // columns are int32, not uint16
};

struct Linear {
    const KernelSet& set;
    int threads, mode, bfloat16, scale;
    const void* x;
    Weight weight;
    const float *alpha, *beta;
    void* y;
    int64_t m, k, group_size;
    const Mixture* mixture = nullptr;  // scale is kTensor then
    const Salient* salient = nullptr;  // scale is kRow or kGroup then

    int64_t groups() const { return scale == kGroup ? k / group_size : 1; }
    int64_t padded() const { return weight.padded_words() * kWordBits; }
    float parameter(const float* values, int64_t i) const {  // rounded to x's dtype, as in training
        return bfloat16 ? rounded_to_bfloat16(values[i]) : values[i];
    }
};

// The products of `count` weights with the same x: y of each. They agree in everything but weight, alpha, beta and y,
// and if there are several, none has a mixture or salient weights. Returns kOk; kBadEntries if salient columns do not
// ascend or leave their row; or 1 + the number of the first token that holds NaN or infinity, in int8 mode. y is
// unspecified unless kOk. Throws std::bad_alloc.
int64_t multiply(const Linear* linears, int count);

}  // namespace fbitrain
