// The pool of threads in trouble: forked while it works, out of memory. Built by test_threads.py.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdio>
#include <thread>

#include "threads.h"

namespace {

std::atomic<bool> no_memory{false};

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::_Exit(1);
}

void loop(int threads) {
    std::atomic<int> done{0};
    fbitrain::parallel_for(threads, 32, [&](int64_t, int) { ++done; });
    check(done == 32, "not every task ran once");
}

void out_of_memory() {
    no_memory = true;
    loop(2);  // there is no pool yet
    no_memory = false;
    loop(2);
    no_memory = true;
    loop(4);  // needs more helpers than there are
    no_memory = false;
    loop(4);
}

// Children are forked at any point of the loops of other threads; an alarm ends those that hang.
void forks(int count) {
    for (int i = 0; i < 3; ++i)
        std::thread([] {
            for (;;) loop(2);
        }).detach();
    for (int i = 0; i < count; ++i) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(5);
            loop(2);
            std::_Exit(0);
        }
        int status = 0;
        check(child > 0 && waitpid(child, &status, 0) == child, "no child");
        check(status == 0, "a forked child hangs in its first loop");
    }
}

void quotas() {
    check(fbitrain::processors_of_quota("max 100000\n") == INT_MAX, "no quota");
    check(fbitrain::processors_of_quota("") == INT_MAX, "nothing to read");
    check(fbitrain::processors_of_quota("250000 100000\n") == 2, "two and a half processors");
    check(fbitrain::processors_of_quota("50000 100000\n") == 1, "half a processor");
}

}  // namespace

void* operator new(std::size_t size) {
    void* p = no_memory ? nullptr : std::malloc(size);
    if (!p) throw std::bad_alloc();
    return p;
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }

int main() {
    quotas();
    out_of_memory();
    forks(200);
    std::puts("ok");
    std::fflush(stdout);
    std::_Exit(0);
}
