// The pool of threads behind parallel_for. Helpers take tasks while there are any; then they spin for as long as it
// takes to get from one layer's call to the next, and sleep if no loop came.
#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <system_error>
#include <thread>

namespace fbitrain {
namespace {

using Clock = std::chrono::steady_clock;

// Waking a thread that sleeps takes 50 µs and more, as long as a small layer's product.
constexpr auto kSpinTime = std::chrono::microseconds(100);
constexpr int kLooksPerCheck = 64;  // of a flag, per look at the clock
constexpr int kMostRanges = 64;     // threads beyond so many share the ranges of others

// Neighbouring tasks, most of which one thread does: they read neighbouring memory, which arrives faster if one
// processor reads it on and on. Measured: two threads that take panels in turns read 12e9 bytes per second, in ranges
// 21e9.
struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;

    // A share of what is left, so that the last tasks are taken singly. False if nothing is.
    bool take(int64_t& begin, int64_t& stop) {
        constexpr int kShares = 4;
        begin = next;
        do {
            if (begin >= end) return false;
            stop = begin + std::max<int64_t>(1, (end - begin) / kShares);
        } while (!next.compare_exchange_weak(begin, stop));
        return true;
    }
};

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// How many processors this process may use at once.
int usable_processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

// How many processors' time the control group grants, by the file cpu.max of its root as a container sees it.
int granted_processors() {
    std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "re");
    if (!file) return INT_MAX;
    char line[64] = "";
    const bool read = std::fgets(line, sizeof line, file);
    std::fclose(file);
    return read ? processors_of_quota(line) : INT_MAX;
}

// Looks at `done` until it holds or kSpinTime is over; whether it held.
template <typename Done>
bool spin_until(const Done& done) {
    const auto start = Clock::now();
    do {
        for (int i = 0; i < kLooksPerCheck; ++i) {
            if (done()) return true;
            pause();
        }
    } while (Clock::now() - start < kSpinTime);
    return false;
}

class Pool {
public:
    // False if another thread is in a loop: the caller then works alone.
    bool run(int threads, int64_t n_tasks, Run run, const void* self) {
        std::unique_lock<std::mutex> alone(one_loop_, std::try_to_lock);
        if (!alone) return false;
        grow(threads - 1);
        run_ = run;
        self_ = self;
        threads_ = threads;
        cut(n_tasks, std::min(threads, kMostRanges));
        wanted_ = threads - 1;
        open_ = true;
        wake();
        work(0);
        open_ = false;  // from here on no helper enters; those inside have announced themselves before they looked
        const auto all_out = [&] { return inside_ == 0; };
        // On a busy machine they may be waiting for this processor.
        while (!spin_until(all_out)) std::this_thread::yield();
        return true;
    }

private:
    void grow(int helpers) {
        try {
            for (; helpers_ < helpers; ++helpers_) std::thread(&Pool::help, this, helpers_ + 1).detach();
        } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
        } catch (const std::bad_alloc&) {
        }
    }

    void wake() {
        ++loops_;
        if (sleepers_ == 0) return;
        {  // after it, one about to sleep has either seen the loop or is asleep
            std::lock_guard<std::mutex> guard(sleep_);
        }
        loop_begun_.notify_all();
    }

    void help(int thread) {
        for (uint64_t seen = 0;;) {
            wait_for_loop(seen);
            seen = loops_;
            ++inside_;
            if (open_ && thread <= wanted_) work(thread);
            --inside_;
        }
    }

    void wait_for_loop(uint64_t seen) {
        // More threads than processors would take from each other what they spin away.
        if (threads_ <= std::min(granted_, usable_processors()) && spin_until([&] { return loops_ != seen; })) return;
        std::unique_lock<std::mutex> guard(sleep_);
        ++sleepers_;
        loop_begun_.wait(guard, [&] { return loops_ != seen; });
        --sleepers_;
    }

    // Does the tasks of this thread's range, then helps with the others', so that all threads end together.
    void work(int thread) {
        for (int i = 0; i < n_ranges_; ++i) {
            Range& range = ranges_[(thread + i) % n_ranges_];
            for (int64_t task, stop; range.take(task, stop);)
                for (; task < stop; ++task) run_(self_, task, thread);
        }
    }

    void cut(int64_t n_tasks, int n_ranges) {
        n_ranges_ = n_ranges;
        for (int64_t i = 0; i < n_ranges; ++i) {
            ranges_[i].next = n_tasks * i / n_ranges;
            ranges_[i].end = n_tasks * (i + 1) / n_ranges;
        }
    }

    const int granted_ = granted_processors();
    std::mutex one_loop_, sleep_;
    std::condition_variable loop_begun_;
    int helpers_ = 0;
    // What the loop is; written while open_ is false and nobody is inside.
    Run run_ = nullptr;
    const void* self_ = nullptr;
    Range ranges_[kMostRanges];
    int n_ranges_ = 0;
    int wanted_ = 0;
    std::atomic<int> threads_{1};
    std::atomic<bool> open_{false};
    std::atomic<int> inside_{0}, sleepers_{0};
    std::atomic<uint64_t> loops_{0};
};

// A forked child has none of its parent's threads, so it gets a pool of its own. No lock guards this: another thread of
// the parent might hold it during the fork, and then it would never be free in the child.
std::atomic<Pool*> current{nullptr};
const bool child_forgets = pthread_atfork(nullptr, nullptr, [] { current = nullptr; }) == 0;

// Null where there can be none. Pools are never destroyed: helpers may be waiting in them when the process ends.
Pool* pool() {
    Pool* found = current;
    if (found || !child_forgets) return found;
    Pool* made = new (std::nothrow) Pool;
    if (current.compare_exchange_strong(found, made)) return made;
    delete made;  // another thread was faster, and this one has no helpers yet
    return found;
}

}  // namespace

int processors_of_quota(const char* cpu_max) {
    long long quota, period;
    if (std::sscanf(cpu_max, "%lld %lld", &quota, &period) != 2 || quota < 1 || period < 1) return INT_MAX;
    return static_cast<int>(std::max<long long>(1, std::min<long long>(quota / period, INT_MAX)));
}

void run_tasks(int threads, int64_t n_tasks, Run run, const void* self) {
    threads = static_cast<int>(std::min<int64_t>(threads, n_tasks));
    if (threads > 1)
        if (Pool* helped = pool(); helped && helped->run(threads, n_tasks, run, self)) return;
    for (int64_t task = 0; task < n_tasks; ++task) run(self, task, 0);
}

}  // namespace fbitrain
