// What this CPU can do at most, for the last column of `python -m fbitrain.kernels.bench`; no part of the library.
// Each loop is a kernel's innermost instructions on registers alone, eight independent chains of them.
#include <time.h>

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

double seconds(clockid_t clock) {
    timespec t;
    clock_gettime(clock, &t);
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

// CPU time of this thread: what other programs take of the core is not counted.
double now() { return seconds(CLOCK_THREAD_CPUTIME_ID); }

constexpr int kLoops = 50000, kChains = 8;

#define EIGHT(CHAIN) CHAIN(0) CHAIN(1) CHAIN(2) CHAIN(3) CHAIN(4) CHAIN(5) CHAIN(6) CHAIN(7)
// A function `name` that measures CHAIN.
#define PEAK(name, CHAIN, weights)                                                                                   \
    double name() {                                                                                                  \
        const double start = now();                                                                                  \
        for (int i = 0; i < kLoops; ++i)                                                                             \
            __asm__ volatile(EIGHT(CHAIN)::                                                                          \
                                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",   \
                                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "rax", "rcx", "rdx", "rsi", \
                                   "rdi", "r8", "r9", "r10");                                                        \
        return double{kLoops} * kChains * (weights) / (now() - start);                                               \
    }

// Of chain j: the sum is in register j; 11 to 15 are operands and scratch.
#define SUM(instruction, width, j) instruction " %%" width "15, %%" width #j ", %%" width #j "\n"

#define AVX2_INT8_ONE(j) \
    "vpand %%ymm14, %%ymm13, %%ymm15\n vpmaddubsw %%ymm12, %%ymm15, %%ymm15\n" SUM("vpaddw", "ymm", j)
#define AVX2_INT8(j) "vpshufb %%ymm12, %%ymm14, %%ymm15\n" SUM("vpaddb", "ymm", j)
#define AVX2_FLOAT_ONE(j) "vpsrld $2, %%ymm12, %%ymm11\n vpermilps %%ymm11, %%ymm14, %%ymm15\n" SUM("vaddps", "ymm", j)
#define AVX2_FLOAT(j) "vpermilps %%ymm12, %%ymm14, %%ymm15\n" SUM("vaddps", "ymm", j)
#define SCALAR_XNOR(j) "popcnt %%rax, %%rcx\n"

#define AVX512_INT8_ONE(j) "vgf2p8affineqb $0, %%zmm14, %%zmm13, %%zmm15\n vpdpbusd %%zmm12, %%zmm15, %%zmm" #j "\n"
#define AVX512_INT8(j) "vpdpbusd %%zmm12, %%zmm14, %%zmm" #j "\n"
#define AVX512_FLOAT_ONE(j) "vpsrld $4, %%zmm12, %%zmm11\n vpermps %%zmm14, %%zmm11, %%zmm15\n" SUM("vaddps", "zmm", j)
#define AVX512_FLOAT(j) "vpermps %%zmm14, %%zmm12, %%zmm15\n" SUM("vaddps", "zmm", j)
#define AVX512_XNOR(j) "vpxord %%zmm12, %%zmm14, %%zmm15\n vpopcntd %%zmm15, %%zmm15\n" SUM("vpaddd", "zmm", j)

PEAK(avx2_int8_one, AVX2_INT8_ONE, 32)
PEAK(avx2_int8, AVX2_INT8, 64)  // 32 rows x 4 columns, of which each needs two
PEAK(avx2_float_one, AVX2_FLOAT_ONE, 16)
PEAK(avx2_float, AVX2_FLOAT, 16)
PEAK(scalar_xnor, SCALAR_XNOR, 64)
PEAK(avx512_int8_one, AVX512_INT8_ONE, 64)
PEAK(avx512_int8, AVX512_INT8, 64)
PEAK(avx512_float_one, AVX512_FLOAT_ONE, 64)
PEAK(avx512_float, AVX512_FLOAT, 64)
PEAK(avx512_xnor, AVX512_XNOR, 512)

#if defined(FBITRAIN_AMX)  // set where these can be assembled and run
double amx_int8() {
    constexpr int kTiles = 6, kSums = 4, kRowBytes = 64, kRows = 16;
    alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < kTiles; ++tile) config[16 + 2 * tile] = kRowBytes, config[48 + tile] = kRows;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
    const double start = now();
    for (int i = 0; i < kLoops; ++i)
        __asm__ volatile(
            "tdpbsud %%tmm5, %%tmm4, %%tmm0\n tdpbsud %%tmm5, %%tmm4, %%tmm1\n"
            "tdpbsud %%tmm5, %%tmm4, %%tmm2\n tdpbsud %%tmm5, %%tmm4, %%tmm3" ::);
    const double taken = now() - start;
    __asm__ volatile("tilerelease" ::);
    return double{kLoops} * kSums * kRows * kRows * kRowBytes / taken;
}
#endif

struct Peak {
    const char* name;
    double (*measure)();
};
constexpr Peak kPeaks[] = {
#if defined(FBITRAIN_AMX)
    {"amx int8", amx_int8},
#endif
    {"avx2 int8 1", avx2_int8_one},
    {"avx2 int8", avx2_int8},
    {"avx2 float 1", avx2_float_one},
    {"avx2 float", avx2_float},
    {"avx2 xnor 1", scalar_xnor},
    {"avx2 xnor", scalar_xnor},
    {"avx512 int8 1", avx512_int8_one},
    {"avx512 int8", avx512_int8},
    {"avx512 float 1", avx512_float_one},
    {"avx512 float", avx512_float},
    {"avx512 xnor 1", avx512_xnor},
    {"avx512 xnor", avx512_xnor}};

}  // namespace

// Weights times tokens per second of one core, by the innermost loop of a level; 0 for a name that is not known. The
// caller has asked whether the CPU runs the level.
extern "C" double fbitrain_peak(const char* name) {
    for (const Peak& peak : kPeaks)
        if (!std::strcmp(peak.name, name)) return peak.measure();
    return 0;
}

// Bytes per second (of CPU time if there is one thread) that `threads` threads read together from memory of `size`
// bytes (larger than the caches).
extern "C" double fbitrain_read_bandwidth(const uint64_t* memory, int64_t size, int threads) {
    const int64_t part = size / 8 / threads;
    std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);
    const auto read = [=, &sums](int t) {
        uint64_t sum[8] = {};
        for (int64_t i = t * part; i + 8 <= (t + 1) * part; i += 8)
            for (int lane = 0; lane < 8; ++lane) sum[lane] += memory[i + lane];
        for (int lane = 0; lane < 8; ++lane) sums[static_cast<size_t>(t) * 8 + lane] = sum[lane];
    };
    const clockid_t clock = threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC;
    const double start = seconds(clock);
    std::vector<std::thread> readers;
    for (int t = 1; t < threads; ++t) readers.emplace_back(read, t);
    read(0);
    for (std::thread& reader : readers) reader.join();
    return static_cast<double>(part * 8 * threads) / (seconds(clock) - start);
}
