// The dtype of activations as a number that kernels are given; the values are those of cuda_linear_plan.DTYPES.
#pragma once
#include "scalar.cuh"

enum Dtype { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2 };

// `value` rounded to a dtype: α and β take part in the dtype of the activations, as in training.
__device__ inline float rounded(float value, int dtype) {
    if (dtype == FLOAT16) return to_float(from_float<f16>(value));
    if (dtype == BFLOAT16) return to_float(from_float<bf16>(value));
    return value;
}

__device__ inline float load_as_float(const void* array, u64 i, int dtype) {
    if (dtype == FLOAT16) return to_float(static_cast<const f16*>(array)[i]);
    if (dtype == BFLOAT16) return to_float(static_cast<const bf16*>(array)[i]);
    return static_cast<const float*>(array)[i];
}

__device__ inline void store_float(void* array, u64 i, int dtype, float value) {
    if (dtype == FLOAT16) static_cast<f16*>(array)[i] = from_float<f16>(value);
    else if (dtype == BFLOAT16) static_cast<bf16*>(array)[i] = from_float<bf16>(value);
    else static_cast<float*>(array)[i] = value;
}
