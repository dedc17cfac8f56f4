// Built-in functions of one thread.
#pragma once
#include <cmath>
#include "simt_warp.h"

static inline int __popc(uint32_t x) { return __builtin_popcount(x); }
static inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
static inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
static inline uint32_t __brev(uint32_t x) {
    uint32_t reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (x >> i & 1) << (31 - i);
    return reversed;
}
// Each nibble of `selector` picks one of the 8 bytes of (b, a), or with its top bit set that byte's sign, eight times.
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        uint32_t nibble = selector >> 4 * i, byte = bytes >> 8 * (nibble & 7) & 255;
        if (nibble & 8) byte = byte & 128 ? 255 : 0;
        result |= byte << 8 * i;
    }
    return result;
}
// Four products of signed bytes, added to c.
static inline int __dp4a(int a, int b, int c) {
    return static_cast<int>(static_cast<uint32_t>(c) + static_cast<uint32_t>(simt::dot_s8(a, b)));
}
template <class T> static inline T __ldg(const T* pointer) { return *pointer; }
template <class T> static inline T __ldcs(const T* pointer) { return *pointer; }
// Fibers change places only where they wait, so nothing can come between reading and writing.
template <class T> static inline T replaced(T* pointer, T value) { T old = *pointer; *pointer = value; return old; }
template <class T> static inline T atomicAdd(T* pointer, T value) { return replaced(pointer, T(*pointer + value)); }
static inline int atomicMax(int* pointer, int value) { return replaced(pointer, value > *pointer ? value : *pointer); }
static inline int atomicMin(int* pointer, int value) { return replaced(pointer, value < *pointer ? value : *pointer); }
static inline int atomicOr(int* pointer, int value) { return replaced(pointer, *pointer | value); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1 / a; }
static inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
static inline float __uint_as_float(uint32_t bits) { return simt::word_to_float(bits); }
static inline float __int_as_float(int bits) { return simt::word_to_float(static_cast<uint32_t>(bits)); }
static inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
static inline void __threadfence() {}
template <class T> static inline T min(T a, T b) { return b < a ? b : a; }
template <class T> static inline T max(T a, T b) { return a < b ? b : a; }
