// Shared memory, and the instructions that move data into and out of it.
#pragma once
#include "simt_warp.h"

namespace simt {

static char* shared_memory;  // the launch's dynamic part; an unmapped page follows it
static size_t shared_bytes;

static void* dynamic_shared() {
    if (!shared_bytes) fail("the kernel uses dynamic shared memory and the launch gives none");
    return shared_memory;
}

// The destination is poisoned until the wait, so that a missing wait or barrier shows.
static void cp_async(void* to, const void* from, int bytes, int valid) {
    auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    if (addresses % bytes) fail("cp.async: misaligned address");
    memset(to, POISON, bytes);
    current->open_copies.push_back({to, from, bytes, valid});
}

static void cp_async_commit() {
    current->copy_groups.push_back(std::move(current->open_copies));
    current->open_copies.clear();
}

static void cp_async_wait(size_t keep) {
    while (current->copy_groups.size() > keep) {
        for (const AsyncCopy& copy : current->copy_groups.front()) {
            memcpy(copy.to, copy.from, copy.valid);
            memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
        }
        current->copy_groups.erase(current->copy_groups.begin());
    }
}

struct MatrixRow { const char* row; uint32_t* result; };

// ldmatrix.m8n8.xN.b16: lane l names row l % 8 of matrix l / 8, and receives word l % 4 of row l / 4 of each.
template <int N> static void ldmatrix(uint32_t (&result)[N], const void* row) {
    MatrixRow mine{static_cast<const char*>(row), result};
    collective(~0u, LDMATRIX, mine, [](MatrixRow** lanes) {
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < N; i++) {
                const char* row = lanes[8 * i + lane / 4]->row;
                if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: a row is not 16-byte aligned");
                memcpy(&lanes[lane]->result[i], row + 4 * (lane % 4), 4);
            }
    });
}

}  // namespace simt
