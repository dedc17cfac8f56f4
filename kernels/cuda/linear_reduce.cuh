// Reductions over a block.
#pragma once
#include "common.cuh"

// `combine` of every thread's value, in every thread. All threads of the block, whole warps, must call it. `combine`
// must not care about order; each use in a kernel needs its own array of 32 values in shared memory.
template <class T, class Combine> __device__ inline T block_reduce(T value, T (&per_warp)[WARP], Combine combine) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
    if (lane == 0) per_warp[warp] = value;
    __syncthreads();
    value = per_warp[0];
    for (int i = 1; i < warps; i++) value = combine(value, per_warp[i]);
    return value;
}
