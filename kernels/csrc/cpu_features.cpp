// Which instruction sets this CPU has and this operating system lets us use.
#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fbitrain {
namespace {

#if defined(__x86_64__)

bool bit(unsigned reg, int position) { return (reg >> position) & 1u; }

// The register states that the OS saves for us when it switches threads (XCR0). An instruction set whose registers it
// does not save must not be used, whatever cpuid says.
uint64_t saved_states() {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !bit(ecx, 27)) return 0;  // OSXSAVE
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}

// Linux gives the 8 KiB of AMX tile data only to processes that ask (Documentation/arch/x86/xstate.rst).
bool tile_data_granted() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

int detect() {
    constexpr uint64_t kYmm = 0x6, kZmm = 0xE6, kTiles = 0x60000;
    const uint64_t states = saved_states();
    unsigned eax, ebx1, ecx1, edx1, ebx7, ecx7, edx7;
    if (!__get_cpuid(1, &eax, &ebx1, &ecx1, &edx1) || !__get_cpuid_count(7, 0, &eax, &ebx7, &ecx7, &edx7))
        return kLevelPortable;
    const bool avx2 = bit(ebx7, 5) && bit(ecx1, 12) && bit(ecx1, 28) && bit(ecx1, 29);  // AVX2, FMA, AVX, F16C
    if (!avx2 || (states & kYmm) != kYmm) return kLevelPortable;
    const bool foundation = bit(ebx7, 16) && bit(ebx7, 17) && bit(ebx7, 30) && bit(ebx7, 31);  // F, DQ, BW, VL
    const bool avx512 = foundation && bit(ecx7, 11) && bit(ecx7, 14) && bit(ecx7, 8);  // VNNI, VPOPCNTDQ, GFNI
    if (!avx512 || (states & kZmm) != kZmm) return kLevelAvx2;
    const bool amx = bit(edx7, 24) && bit(edx7, 25);  // AMX-TILE, AMX-INT8
    if (!amx || (states & kTiles) != kTiles || !tile_data_granted()) return kLevelAvx512;
    return kLevelAmx;
}

#else

int detect() { return kLevelPortable; }

#endif

}  // namespace

int highest_level() {
    static const int level = detect();
    return level;
}

}  // namespace fbitrain
