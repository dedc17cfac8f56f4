// Tensor-core products: a warp's d[16, 8] += a[16, 32 bytes] · b[8, 32 bytes]ᵀ, whatever the bytes hold: 256 bits, 32
// int8, or 16 floats of 16 bits. All 32 lanes must call them.
//
// Who holds what is the same for every type (PTX ISA, "Matrix Fragments for mma"). With g = lane / 4 and t = lane % 4:
//
//   a[i]   row g + 8·(i % 2),  bytes 4t + 16·(i / 2) .. + 3      rows of A along K
//   b[i]   row g,              bytes 4t + 16·i .. + 3            rows of B along K: a weight as it lies in memory
//   d[i]   row g + 8·(i / 2),  column 2t + i % 2
//
// ldmatrix_x4 of the four 8 × 16-byte quarters of A (rows 0–7, rows 8–15, then both again 16 bytes further) loads
// exactly a[0..3], and ldmatrix_x2 loads b.
#pragma once
#include "scalar.cuh"

// sm_80 to sm_90 multiply bits natively; from sm_100 on the instruction is emulated by eight int8 products
// and 24 transposes, so int8 is used directly (see popc_of_and in xnor_tile.cu).
#define FBITRAIN_NATIVE_B1 (FBITRAIN_ARCH >= 800 && FBITRAIN_ARCH < 1000)

#ifndef SIMT_HOST
// The instruction with the fragments d, a and b of the function around it; `sum` is the constraint of d's registers.
#define FBITRAIN_MMA(shape_and_types, sum)                                                                            \
    asm volatile("mma.sync.aligned." shape_and_types " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"         \
                 : sum(d[0]), sum(d[1]), sum(d[2]), sum(d[3])                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// d += popcount(a & b) over 256 bits. AND, not XOR: sm_90 has only AND natively and makes two of them out of a XOR.
__device__ inline void mma_and_popc_16x8x256(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef SIMT_HOST
    simt::mma(d, a, b, [](u32 x, u32 y) { return i32(__popc(x & y)); });
#else
    FBITRAIN_MMA("m16n8k256.row.col.s32.b1.b1.s32.and.popc", "+r");
#endif
}

// d += Σ a·b over 32 signed bytes; wraps around int32.
__device__ inline void mma_s8_16x8x32(i32 (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef SIMT_HOST
    simt::mma(d, a, b, simt::dot_s8);
#else
    FBITRAIN_MMA("m16n8k32.row.col.s32.s8.s8.s32", "+r");
#endif
}

// d += Σ a·b over 16 floats of type T (f16 or bf16), summed in fp32.
template <class T> __device__ void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]);

template <> __device__ inline void mma_16x8x16<f16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef SIMT_HOST
    simt::mma(d, a, b, simt::dot_f16);
#else
    FBITRAIN_MMA("m16n8k16.row.col.f32.f16.f16.f32", "+f");
#endif
}

template <> __device__ inline void mma_16x8x16<bf16>(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#ifdef SIMT_HOST
    simt::mma(d, a, b, simt::dot_bf16);
#else
    FBITRAIN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32", "+f");
#endif
}
