// Copies that need their own instructions: from global to shared memory in the background (cp.async, sm_80 and later),
// and from shared memory into tensor-core fragments (ldmatrix).
#pragma once
#include "common.cuh"

#ifndef SIMT_HOST
__device__ inline u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }
#endif

// Starts copying BYTES (4, 8 or 16; both addresses aligned to it): `valid` of them from `global`, then zeros. With
// valid = 0 `global` is not read.
template <int BYTES> __device__ inline void cp_async(void* shared, const void* global, int valid) {
#ifdef SIMT_HOST
    simt::cp_async(shared, global, BYTES, valid);
#else
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     ::"r"(shared_address(shared)), "l"(global), "r"(valid) : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     ::"r"(shared_address(shared)), "l"(global), "n"(BYTES), "r"(valid) : "memory");
    }
#endif
}

// Closes this thread's group of copies; a group may be empty.
__device__ inline void cp_async_commit() {
#ifdef SIMT_HOST
    simt::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most KEEP of this thread's groups are under way. Other threads' copies need a barrier after it.
template <int KEEP> __device__ inline void cp_async_wait() {
#ifdef SIMT_HOST
    simt::cp_async_wait(KEEP);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(KEEP) : "memory");
#endif
}

// Loads four (two) matrices of 8 rows of 16 bytes. Lane l names row l % 8 of matrix l / 8; afterwards r[i] of lane l is
// word l % 4 of row l / 4 of matrix i. With x2, lanes 16 to 31 name nothing but must pass a valid address.
__device__ inline void ldmatrix_x4(u32 (&r)[4], const void* row) {
#ifdef SIMT_HOST
    simt::ldmatrix(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
#endif
}

__device__ inline void ldmatrix_x2(u32 (&r)[2], const void* row) {
#ifdef SIMT_HOST
    simt::ldmatrix(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
#endif
}
