// The C functions of the linear products: what they refuse, and the Linear that their arguments describe.
#include <new>

#include "linear.h"

namespace fbitrain {
namespace {

// What all of them refuse before they look at a pointer, or kOk. `set` is the level's.
int64_t refuse(const KernelSet* set, int threads, int mode, int64_t m, int64_t n, int64_t k) {
    if (!set) return kNoLevel;
    const bool known = mode == kFloatMode || mode == kInt8Mode;
    return !known || threads < 1 || m < 0 || n < 0 || k < 1 || k > kMaxColumns ? kBadArgument : kOk;
}

bool are_groups(int64_t k, int64_t group_size) {
    return group_size >= kWordBits && group_size % kWordBits == 0 && k % group_size == 0;
}

// A Linear as all calls describe one; shift, groups, mixture and salient weights are the caller's to add.
Linear linear_of(const KernelSet& set, int threads, int mode, int bfloat16, int scale, const void* x, const void* words,
                 const float* alpha, void* y, int64_t m, int64_t n, int64_t k) {
    return {.set = set,
            .threads = threads,
            .mode = mode,
            .bfloat16 = bfloat16,
            .scale = scale,
            .x = x,
            .weight = {static_cast<const uint32_t*>(words), n, (k + kWordBits - 1) / kWordBits},
            .alpha = alpha,
            .y = y,
            .m = m,
            .k = k};
}

int64_t multiply_one(const Linear& linear) noexcept {
    try {
        return multiply(&linear, 1);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

bool ascends(const int32_t* row_starts, int64_t n, int64_t entries) {
    for (int64_t row = 0; row < n; ++row)
        if (row_starts[row] > row_starts[row + 1]) return false;
    return row_starts[0] == 0 && row_starts[n] == entries;
}

}  // namespace
}  // namespace fbitrain

// x [m][k] and y [m][n] of float32 or bfloat16; words [n][ceil(k / 32)]; interleaved: what fbitrain_interleave makes of
// them for this level, or null; alpha and beta (null: none) float32 in the shape of `scale`; all contiguous. group_size
// is read for groups only, a multiple of 32 that divides k. Returns a Status, or 1 + the number of the first token that
// holds NaN or infinity, in int8 mode; y is then unspecified.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_binary_linear(int level, int threads, int mode, int bfloat16, int scale,
                                                          const void* x, const void* words, const void* interleaved,
                                                          const float* alpha, const float* beta, void* y, int64_t m,
                                                          int64_t n, int64_t k, int64_t group_size) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (const int64_t status = refuse(set, threads, mode, m, n, k)) return status;
    if (scale < kColumn || scale > kGroup) return kBadArgument;
    if (scale == kGroup && (beta || !are_groups(k, group_size))) return kBadArgument;
    if (m == 0 || n == 0) return kOk;
    if (!x || !words || !alpha || !y || reinterpret_cast<uintptr_t>(interleaved) % 64) return kBadArgument;
    Linear linear = linear_of(*set, threads, mode, bfloat16, scale, x, words, alpha, y, m, n, k);
    linear.weight.interleaved = static_cast<const uint32_t*>(interleaved);
    linear.beta = beta;
    linear.group_size = group_size;
    return multiply_one(linear);
}

// As above, with gates [m][experts], alpha_in [experts][k] and alpha_out [experts][n] in float32.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_mixture_linear(int level, int threads, int mode, int bfloat16,
                                                           const void* x, const void* words, const float* gates,
                                                           const float* alpha_in, const float* alpha_out, void* y,
                                                           int64_t m, int64_t n, int64_t k, int64_t experts) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (const int64_t status = refuse(set, threads, mode, m, n, k)) return status;
    if (experts < 1) return kBadArgument;
    if (m == 0 || n == 0) return kOk;
    if (!x || !words || !gates || !alpha_in || !alpha_out || !y) return kBadArgument;
    static constexpr float kOne = 1.0f;
    const Mixture mixture{gates, alpha_in, alpha_out, experts};
    Linear linear = linear_of(*set, threads, mode, bfloat16, kTensor, x, words, &kOne, y, m, n, k);
    linear.mixture = &mixture;
    return multiply_one(linear);
}

// As binary_linear with scale kRow or kGroup, with salient entries: row_starts [n + 1]; columns [entries], uint16 if k
// <= 65536 and int32 beyond; values [entries], int8 with value_scale float32 [n], float16 without. Returns kBadEntries
// too.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_partial_linear(int level, int threads, int mode, int bfloat16, int scale,
                                                           const void* x, const void* words, const float* alpha,
                                                           const int32_t* row_starts, const void* columns,
                                                           const void* values, const float* value_scale, void* y,
                                                           int64_t m, int64_t n, int64_t k, int64_t group_size,
                                                           int64_t entries) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (const int64_t status = refuse(set, threads, mode, m, n, k)) return status;
    if (scale != kRow && scale != kGroup) return kBadArgument;
    if ((scale == kGroup && !are_groups(k, group_size)) || entries < 0) return kBadArgument;
    if (m == 0 || n == 0) return kOk;
    if (!x || !words || !alpha || !row_starts || !y || (entries > 0 && (!columns || !values))) return kBadArgument;
    if (!ascends(row_starts, n, entries)) return kBadEntries;
    const Salient salient{row_starts, columns, values, value_scale, k > int64_t{1} << 16};
    Linear linear = linear_of(*set, threads, mode, bfloat16, scale, x, words, alpha, y, m, n, k);
    linear.group_size = group_size;
    linear.salient = &salient;
    return multiply_one(linear);
}
