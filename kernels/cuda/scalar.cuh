// 16-bit floats as their bits, and conversions. The conversions round to nearest, ties to even.
#pragma once
#include "common.cuh"

struct f16 { u16 bits; };
struct bf16 { u16 bits; };

__device__ inline u32 bits_of(float x) { return __float_as_uint(x); }

__device__ inline float to_float(float x) { return x; }

__device__ inline float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

__device__ inline float to_float(f16 x) {
#ifdef SIMT_HOST
    return simt::half_to_float(x.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
#endif
}

template <class T> __device__ T from_float(float x);

template <> __device__ inline float from_float<float>(float x) { return x; }

template <> __device__ inline f16 from_float<f16>(float x) {
#ifdef SIMT_HOST
    return {simt::float_to_half(x)};
#else
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
#endif
}

template <> __device__ inline bf16 from_float<bf16>(float x) {
    u32 bits = bits_of(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};  // NaN, as the CPU's; rounding could carry it into -0
    return {u16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

// Two values as one register of a tensor-core fragment: `low` in the low half.
template <class T> __device__ inline u32 pair(T low, T high) { return u32(low.bits) | u32(high.bits) << 16; }
