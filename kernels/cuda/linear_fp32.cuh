// How fp32 activations lie for linear_fp32.cu: in spans of 1024 columns, which are 32 words of a weight row, one per
// lane. The loads of a warp, four columns of each lane's word, are 512 contiguous bytes.
#pragma once
#include "common.cuh"

constexpr int SPAN = WARP * 32;

struct __align__(16) Floats { float at[4]; };

// Where column k of a token lies; `spans` = ceil(K / 1024).
__device__ inline u64 fp32_position(int token, int k, int spans) {
    const int lane = k % SPAN / 32, bit = k % 32;
    return (u64(token) * spans + k / SPAN) * SPAN + (bit / 4 * WARP + lane) * 4 + bit % 4;
}
