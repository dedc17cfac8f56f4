// A loop over independent tasks on several threads, and aligned memory.
//
// The threads are our own rather than OpenMP's: at the end of an OpenMP loop the caller waits for every thread of the
// team, one that the operating system has not even woken included. On a busy machine that costs milliseconds, for loops
// that take 100 µs. Here the caller works on the tasks too and waits only for threads that have begun one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace fbitrain {

using Run = void (*)(const void* self, int64_t task, int thread);

// Calls run(self, task, thread) for each task < n_tasks on up to `threads` threads; see threads.cpp.
void run_tasks(int threads, int64_t n_tasks, Run run, const void* self);

// Whole processors that a control group's cpu.max ("QUOTA PERIOD" in µs, or "max PERIOD") pays for: INT_MAX without a
// quota, 1 at least.
int processors_of_quota(const char* cpu_max);

// Calls body(task, thread) for each task < n_tasks, thread < threads. `body` must not throw.
template <typename Body>
void parallel_for(int threads, int64_t n_tasks, const Body& body) {
    run_tasks(
        threads, n_tasks,
        [](const void* self, int64_t task, int thread) { (*static_cast<const Body*>(self))(task, thread); }, &body);
}

// As many threads as are worth waking for `work` weights times tokens: waking one takes as long as about 2^19 of them.
inline int useful_threads(int threads, int64_t work) {
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work >> 19)));
}

struct Free {
    void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

// Uninitialised, 64-byte aligned. Throws std::bad_alloc.
template <typename T>
Buffer<T> allocate(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    void* p = std::aligned_alloc(64, std::max<size_t>(bytes, 64));
    if (!p) throw std::bad_alloc();
    return Buffer<T>(static_cast<T*>(p));
}

}  // namespace fbitrain
