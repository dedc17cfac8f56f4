// The bits of a weight's transpose, which the gradient of its input needs.
#include <algorithm>

#include "kernels.h"
#include "threads.h"

namespace fbitrain {
namespace {

constexpr int kLineWords = 16;  // blocks of 32 rows taken together, so that whole cache lines are written

// Bit j of word i becomes bit i of word j: blocks of 16, 8, ... bits across the diagonal change places.
void transpose_32x32(uint32_t* words) {
    uint32_t mask = 0x0000FFFFu;
    for (int size = 16; size; size /= 2, mask ^= mask << size)
        for (int i = 0; i < kWordBits; i = ((i | size) + 1) & ~size) {
            const uint32_t differing = ((words[i] >> size) ^ words[i | size]) & mask;
            words[i] ^= differing << size;
            words[i | size] ^= differing;
        }
}

// Rows 32 * first_block .. of words [n][row_words] -> words first_block .. of the rows of out [k][out_words].
void transpose_rows(const uint32_t* words, int64_t n, int64_t k, int64_t first_block, uint32_t* out) {
    const int64_t row_words = (k + kWordBits - 1) / kWordBits, out_words = (n + kWordBits - 1) / kWordBits;
    const int blocks = static_cast<int>(std::min<int64_t>(kLineWords, out_words - first_block));
    for (int64_t w = 0; w < row_words; ++w) {
        uint32_t block[kLineWords][kWordBits] = {};
        for (int b = 0; b < blocks; ++b) {
            const int64_t row = (first_block + b) * kWordBits;
            for (int64_t i = 0; i < std::min<int64_t>(kWordBits, n - row); ++i)
                block[b][i] = words[(row + i) * row_words + w];
            transpose_32x32(block[b]);
        }
        for (int64_t i = 0; i < std::min<int64_t>(kWordBits, k - w * kWordBits); ++i)
            for (int b = 0; b < blocks; ++b) out[(w * kWordBits + i) * out_words + first_block + b] = block[b][i];
    }
}

}  // namespace
}  // namespace fbitrain

// words [n][ceil(k / 32)] -> out [k][ceil(n / 32)], both with zeros past their rows' ends. Returns a Status.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_transpose_signs(int threads, const void* words, void* out, int64_t n,
                                                            int64_t k) noexcept {
    using namespace fbitrain;
    if (threads < 1 || n < 0 || k < 0) return kBadArgument;
    if (n == 0 || k == 0) return kOk;
    if (!words || !out) return kBadArgument;
    const int64_t out_words = (n + kWordBits - 1) / kWordBits;
    parallel_for(useful_threads(threads, n * k), (out_words + kLineWords - 1) / kLineWords, [&](int64_t task, int) {
        transpose_rows(static_cast<const uint32_t*>(words), n, k, task * kLineWords, static_cast<uint32_t*>(out));
    });
    return kOk;
}
