// A weight's bits put in order once, for all the products with few tokens that are to come.
#include <cstdint>

#include "kernels.h"
#include "panel.h"
#include "threads.h"

// Bytes that fbitrain_interleave writes for a weight of n rows of k columns; 0 where the level has no use for it.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_interleaved_bytes(int level, int64_t n, int64_t k) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (!set) return kNoLevel;
    if (n < 0 || k < 0 || k > kMaxColumns) return kBadArgument;
    const Weight weight{nullptr, n, (k + kWordBits - 1) / kWordBits};
    return set->interleave ? weight.panels() * weight.padded_words() * kRows * static_cast<int64_t>(sizeof(uint32_t))
                           : 0;
}

// words [n][ceil(k / 32)] -> out, 64-byte aligned, in the order that the level looks bits up in. Returns a Status.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_interleave(int level, int threads, const void* words, void* out, int64_t n,
                                                       int64_t k) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (!set) return kNoLevel;
    if (!set->interleave || threads < 1 || n < 0 || k < 0 || k > kMaxColumns) return kBadArgument;
    if (n == 0 || k == 0) return kOk;
    if (!words || !out || reinterpret_cast<uintptr_t>(out) % 64) return kBadArgument;
    const Weight weight{static_cast<const uint32_t*>(words), n, (k + kWordBits - 1) / kWordBits};
    parallel_for(useful_threads(threads, n * k), weight.panels(), [&](int64_t panel, int) {
        auto* bits = static_cast<uint32_t*>(out) + panel * weight.padded_words() * kRows;
        for (int64_t word = 0; word < weight.padded_words(); word += kReadWords) {
            const int n_words = weight.read(*set, panel, word, bits + word * kRows);
            set->interleave(bits + word * kRows, n_words);
        }
    });
    return kOk;
}
