// What all kernels here share: short names for the integers, the architecture, dynamic shared memory, sums over a warp.
//
// No header of the CUDA toolkit is included anywhere in this folder: a machine that runs these kernels through CuPy may
// have none (NVRTC has not even <cstdint>). The same files are compiled as C++ by the tests, with SIMT_HOST defined,
// and run on the CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;
typedef long long i64;

constexpr int WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

// The architecture being compiled for: 800 for sm_80. The tests set it themselves.
#ifndef FBITRAIN_ARCH
#ifdef __CUDA_ARCH__
#define FBITRAIN_ARCH __CUDA_ARCH__
#else
#define FBITRAIN_ARCH 0  // nvcc's pass over the host's side, which has no kernels
#endif
#endif

// DYNAMIC_SHARED(T, name): the launch's dynamic shared memory as an array of T. On the CPU it ends at an unmapped page.
#ifdef SIMT_HOST
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(simt::dynamic_shared())
#else
#define DYNAMIC_SHARED(T, name)                             \
    extern __shared__ __align__(16) u8 dynamic_shared_[];   \
    T* name = reinterpret_cast<T*>(dynamic_shared_)
#endif

__device__ inline i32 imin(i32 a, i32 b) { return a < b ? a : b; }
__device__ inline i32 imax(i32 a, i32 b) { return a < b ? b : a; }
__device__ constexpr i32 ceil_div(i32 a, i32 b) { return (a + b - 1) / b; }

__device__ inline bool aligned16(const void* pointer) { return (reinterpret_cast<u64>(pointer) & 15) == 0; }

// The sum over the warp's lanes, in every lane. All 32 must call it.
template <class T> __device__ inline T warp_sum(T value) {
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}
