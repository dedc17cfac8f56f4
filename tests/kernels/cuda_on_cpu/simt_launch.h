// Launching a kernel: the grid, faults turned into messages, and what host_module.py calls.
#pragma once
#include <csetjmp>
#include <csignal>
#include <link.h>
#include <xmmintrin.h>
#include "simt_memory.h"

namespace simt {

constexpr size_t MAX_SHARED_BYTES = 99 * 1024;       // what every architecture since sm_86 has at least
static thread_local volatile char in_shared_memory;  // makes sure that there is a thread-local segment

// The segment of this library's thread-local variables: its static shared memory (see __shared__).
static std::pair<char*, size_t> static_shared() {
    static std::pair<char*, size_t> found;
    in_shared_memory = 1;  // a segment exists once it is used
    if (!found.first) dl_iterate_phdr([](dl_phdr_info* library, size_t, void*) {
        auto address = reinterpret_cast<uintptr_t>(&threads);
        bool ours = false;
        size_t bytes = 0;
        for (int i = 0; i < library->dlpi_phnum; i++) {
            const auto& segment = library->dlpi_phdr[i];
            if (segment.p_type == PT_LOAD) ours |= address - library->dlpi_addr - segment.p_vaddr < segment.p_memsz;
            if (segment.p_type == PT_TLS) bytes = segment.p_memsz;
        }
        if (ours) found = {static_cast<char*>(library->dlpi_tls_data), bytes};
        return static_cast<int>(ours);
    }, nullptr);
    return found;
}

static sigjmp_buf fault;

static void on_fault(int signal, siginfo_t* info, void*) {
    char text[80];
    snprintf(text, sizeof text, "illegal memory access at %p", info->si_addr);
    // -fsanitize=alignment,bounds traps with an illegal instruction.
    error = (signal == SIGILL ? "misaligned address, or index outside an array" : text) + where();
    siglongjmp(fault, 1);
}

// Turns faults into `error` while it lives, and flushes denormals as CuPy's -ftz=true does.
struct Environment {
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL};
    struct sigaction old_action[3];
    stack_t old_stack;
    unsigned old_mode = _mm_getcsr();

    Environment() {
        static char alternative[1 << 16];
        stack_t stack{};
        stack.ss_sp = alternative, stack.ss_size = sizeof alternative;
        sigaltstack(&stack, &old_stack);
        struct sigaction action{};
        action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &old_action[i]);
        _mm_setcsr(old_mode | 0x8040);
    }
    ~Environment() {
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &old_action[i], nullptr);
        sigaltstack(&old_stack, nullptr);
        _mm_setcsr(old_mode);
    }
};

static const char* check_launch(const unsigned* grid, const unsigned* block) {
    uint64_t n = uint64_t{block[0]} * block[1] * block[2], blocks = uint64_t{grid[0]} * grid[1] * grid[2];
    if (!blocks || !n || n > 1024 || block[2] > 64) return "invalid launch: grid or block";
    if (grid[0] > 2147483647u || grid[1] > 65535 || grid[2] > 65535) return "invalid launch: grid too large";
    if (shared_bytes + static_shared().second > MAX_SHARED_BYTES) return "invalid launch: too much shared memory";
    return nullptr;
}

static void prepare_threads(const unsigned* block) {
    size_t n = size_t{block[0]} * block[1] * block[2];
    while (threads.size() < n) {
        threads.push_back({});
        threads.back().linear = static_cast<int>(threads.size()) - 1;
    }
    for (size_t i = 0; i < n; i++) {
        auto row = unsigned(i / block[0]);
        threads[i].index = {unsigned(i % block[0]), row % block[1], row / block[1]};
        restart(threads[i]);
    }
    meetings.assign((n + 31) / 32 * 32, {});
}

static void run_grid() {
    auto [static_part, static_bytes] = static_shared();
    if (sigsetjmp(fault, 1)) return;
    for (unsigned z = 0; z < grid_size.z; z++)
        for (unsigned y = 0; y < grid_size.y; y++)
            for (unsigned x = 0; x < grid_size.x; x++) {
                block_index = {x, y, z};
                memset(static_part, POISON, static_bytes);
                if (shared_bytes) memset(shared_memory, POISON, shared_bytes);
                run_block();
                if (!error.empty()) return;
            }
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
}

// Returns what went wrong, or null. `shared` holds `bytes` of dynamic shared memory; `order`: see draw_order.
template <class... A>
static const char* launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, char* shared, size_t bytes,
                          void** arguments, int turns) {
    struct Call { void (*kernel)(A...); void** arguments; } bound{kernel, arguments};
    kernel_body = [](void* p) {
        auto* c = static_cast<Call*>(p);
        call(c->kernel, c->arguments, std::index_sequence_for<A...>{});
    };
    kernel_arguments = &bound;
    shared_memory = shared, shared_bytes = bytes, order = turns, random_state = turns;
    if (const char* refused = check_launch(grid, block)) return refused;
    grid_size = {grid[0], grid[1], grid[2]}, block_size = {block[0], block[1], block[2]};
    error.clear();
    prepare_threads(block);
    Environment environment;
    run_grid();
    return error.empty() ? nullptr : error.c_str();
}

// Sizes of the kernel's parameters in bytes; returns their number.
template <class... A> static int parameters(void (*)(A...), int* sizes) {
    int all[] = {static_cast<int>(sizeof(A))..., 0};
    for (size_t i = 0; i < sizeof...(A); i++) sizes[i] = all[i];
    return sizeof...(A);
}

}  // namespace simt

#define SIMT_EXPORT(kernel)                                                                                            \
    extern "C" const char* kernel##__launch(const unsigned* grid, const unsigned* block, char* shared, size_t bytes,  \
                                            void** arguments, int order) {                                             \
        return simt::launch(::kernel, grid, block, shared, bytes, arguments, order);                                   \
    }                                                                                                                  \
    extern "C" int kernel##__parameters(int* sizes) { return simt::parameters(::kernel, sizes); }
