// CUDA threads as fibers, and the scheduler that runs one block of them.
#pragma once
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

namespace simt {

constexpr unsigned char POISON = 0xCB;
constexpr size_t STACK_BYTES = 64 << 10, PAGE = 4096;

enum class State { READY, AT_BLOCK_BARRIER, IN_WARP_COLLECTIVE, DONE };

// A copy that cp.async has started; it is carried out at the wait.
struct AsyncCopy { void* to; const void* from; int bytes, valid; };

struct Thread {
    uint3 index;
    int linear;
    State state;
    int barrier;  // the source line it waits at
    char* stack;
    void* stack_pointer;
    std::vector<AsyncCopy> open_copies;
    std::vector<std::vector<AsyncCopy>> copy_groups;
};

// The lanes of one warp that meet in a collective.
struct Meeting { uint32_t mask, arrived; int operation; void* operands[32]; };

static std::vector<Thread> threads;
static std::vector<Meeting> meetings;  // 32 per warp: one for each possible lowest lane of a mask
static Thread* current;
static void* scheduler_stack_pointer;
static void (*kernel_body)(void*);
static void* kernel_arguments;
static std::string error;
static uint3 block_index;
static dim3 grid_size, block_size;
static int order;
static uint64_t random_state;

extern "C" void simt_swap_(void** save, void* next) __attribute__((visibility("hidden")));
// Saves the callee-saved registers on this stack, continues on the other one.
asm(R"(
.text
.hidden simt_swap_
.globl simt_swap_
.type simt_swap_,@function
simt_swap_:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp,(%rdi)
    mov %rsi,%rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    pop %rcx
    jmp *%rcx
.size simt_swap_,.-simt_swap_
)");

static inline void yield() { simt_swap_(&current->stack_pointer, scheduler_stack_pointer); }

static std::string where() {
    char text[120];
    snprintf(text, sizeof text, " [block %u,%u,%u thread %u,%u,%u]", block_index.x, block_index.y, block_index.z,
             current->index.x, current->index.y, current->index.z);
    return text;
}

// Gives the block up: the scheduler never resumes it.
[[noreturn]] static void fail(const std::string& message) {
    if (error.empty()) error = message + where();
    for (;;) yield();
}

static void fiber_main() {
    for (;;) {
        kernel_body(kernel_arguments);
        bool copying = !current->open_copies.empty() || !current->copy_groups.empty();
        if (copying) fail("a thread ends with cp.async under way");
        current->state = State::DONE;
        yield();
    }
}

// Makes the fiber start from the beginning when it is resumed next.
static void restart(Thread& thread) {
    if (!thread.stack) {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        char* base = static_cast<char*>(mmap(nullptr, STACK_BYTES + PAGE, PROT_READ | PROT_WRITE, flags, -1, 0));
        if (base == MAP_FAILED) abort();
        mprotect(base, PAGE, PROT_NONE);
        thread.stack = base + PAGE;
    }
    // Staggered, because stacks at equal offsets in their pages would share a few sets of the L1 cache.
    size_t stagger = static_cast<size_t>(thread.linear) * 320 % PAGE;
    void** top = reinterpret_cast<void**>(thread.stack + STACK_BYTES - stagger) - 2;
    top[0] = reinterpret_cast<void*>(fiber_main);
    top[1] = nullptr;
    memset(top - 6, 0, 6 * sizeof(void*));  // the registers that simt_swap_ pops
    thread.stack_pointer = top - 6;
    thread.open_copies.clear();
    thread.copy_groups.clear();
}

// The order of the turns: 0 forward, 1 backward, otherwise the seed of a random one, drawn anew in each round. In odd
// orders a warp runs until it waits at a block's barrier or ends, before the next one runs at all; in even ones all warps
// advance together, from one collective to the next.
static void draw_order(int n, int& start, int& step) {
    start = 0, step = 1;
    if (order == 1) start = step = n - 1;
    if (order < 2) return;
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    start = (random_state >> 33) % n;
    step = (random_state >> 40) % n | 1;
    while (std::gcd(step, n) != 1) step += 2;
}

// Lets each of `n` threads that can run do so once; returns how many there were.
static int run_threads(int first, int n) {
    int start, step, ran = 0;
    draw_order(n, start, step);
    for (int k = 0, i = start; k < n && error.empty(); k++, i = (i + step) % n) {
        if (threads[first + i].state != State::READY) continue;
        current = &threads[first + i];
        simt_swap_(&scheduler_stack_pointer, current->stack_pointer);
        ran++;
    }
    return ran;
}

// Lets the block's threads take turns; returns how many turns there were.
static int run_round(int n) {
    if (order % 2 == 0) return run_threads(0, n);
    int warps = (n + 31) / 32, start, step, ran = 0;
    draw_order(warps, start, step);
    for (int k = 0, warp = start; k < warps; k++, warp = (warp + step) % warps)
        while (int turns = run_threads(32 * warp, std::min(32, n - 32 * warp))) ran += turns;
    return ran;
}

// Nobody can run: everybody must be waiting at one and the same __syncthreads.
static void release_barrier(int n) {
    const Thread* first = nullptr;
    for (int i = 0; i < n; i++) {
        current = &threads[i];
        if (current->state == State::DONE) continue;
        if (current->state == State::IN_WARP_COLLECTIVE) {
            error = "deadlock: a warp collective waits for lanes that ended or sit at a barrier" + where();
            return;
        }
        if (first && first->barrier != current->barrier) {
            error = "divergent __syncthreads: threads wait at different ones" + where();
            return;
        }
        first = current;
    }
    for (int i = 0; i < n; i++)
        if (threads[i].state == State::DONE) error = "__syncthreads waits for threads that ended" + where();
    for (int i = 0; i < n; i++) threads[i].state = State::READY;
}

static bool all_done(int n) {
    for (int i = 0; i < n; i++)
        if (threads[i].state != State::DONE) return false;
    return true;
}

static void run_block() {
    int n = block_size.x * block_size.y * block_size.z;
    for (Meeting& meeting : meetings) meeting = Meeting{};
    for (int i = 0; i < n; i++) threads[i].state = State::READY;
    while (error.empty()) {
        if (run_round(n) || !error.empty()) continue;
        if (all_done(n)) return;
        release_barrier(n);
    }
}

// The line tells barriers apart: gcc may merge two calls.
static inline void block_barrier(int line) {
    current->state = State::AT_BLOCK_BARRIER;
    current->barrier = line;
    yield();
}

}  // namespace simt

#define threadIdx (simt::current->index)
#define blockIdx (simt::block_index)
#define blockDim (simt::block_size)
#define gridDim (simt::grid_size)
#define __syncthreads() simt::block_barrier(__LINE__)
static const int warpSize = 32;
