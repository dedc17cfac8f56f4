// The product of two packed matrices of +1 and -1, and packing itself: what lies around the block functions.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "panel.h"
#include "threads.h"

namespace fbitrain {
namespace {

constexpr int kNibbles = kWordBits / 4;
constexpr int kSlabTokens = 4 * kBlockTokens;  // tokens whose nibbles exist at a time
constexpr int kWriteAhead = 6;  // tokens

void split_nibbles(const uint32_t* a, int64_t n_words, uint8_t* nibbles) {
    for (int64_t w = 0; w < n_words; ++w)
        for (int i = 0; i < kNibbles; ++i)
            nibbles[kNibbles * w + i] = static_cast<uint8_t>((a[w] >> (4 * i) & 15) << 4);
}

struct Product {
    const KernelSet& set;
    int threads;
    const uint32_t* a;  // [m][b.row_words]
    Weight b;
    int32_t* out;  // [m][b.n]
    int64_t m, k;

    int64_t token_stride() const { return b.padded_words() + kSkew / kNibbles; }  // of padded a, in words
};

// One panel of b and the tokens begin .. begin + tokens; `a` and `nibbles` are padded rows, from token 0 of the slab.
void run_panel(const Product& p, int64_t panel, int64_t first, int64_t begin, int tokens, const uint32_t* a,
               const uint8_t* nibbles) {
    alignas(64) uint32_t bits[kReadWords * kRows];
    alignas(64) int32_t differing[kBlockTokens][kRows];
    std::memset(differing, 0, sizeof(int32_t) * tokens * kRows);
    const int64_t stride = p.token_stride();
    for (int64_t word = 0; word < p.b.padded_words();) {
        const int n_words = p.b.read(p.set, panel, word, bits);
        for (int first_word = 0; first_word < n_words; first_word += kBlockWords) {
            const int width = std::min(kBlockWords, n_words - first_word);
            const int64_t start = begin * stride + word + first_word;
            p.set.xnor_block(bits + first_word * kRows, width, a + start, nibbles + kNibbles * start, stride, tokens,
                             &differing[0][0]);
        }
        word += n_words;
    }
    for (int t = 0; t < tokens; ++t) {
        int32_t* out = p.out + (first + begin + t) * p.b.n + panel * kRows;
        if (t + kWriteAhead < tokens)  // each token's part is in another page
            for (int r = 0; r < kRows; r += 16) __builtin_prefetch(out + kWriteAhead * p.b.n + r, 1);
        for (int r = 0; r < p.b.rows_of(panel); ++r) out[r] = static_cast<int32_t>(p.k) - 2 * differing[t][r];
    }
}

int64_t multiply(const Product& p) {
    const int64_t stride = p.token_stride(), most = std::min<int64_t>(p.m, kSlabTokens);
    const auto a = allocate<uint32_t>(most * stride);
    const auto nibbles = allocate<uint8_t>(most * stride * kNibbles);
    for (int64_t first = 0; first < p.m; first += kSlabTokens) {
        const int64_t count = std::min<int64_t>(kSlabTokens, p.m - first);
        parallel_for(useful_threads(p.threads, count * p.k), count, [&](int64_t t, int) {
            uint32_t* row = a.get() + t * stride;
            std::memcpy(row, p.a + (first + t) * p.b.row_words, sizeof(uint32_t) * p.b.row_words);
            std::fill(row + p.b.row_words, row + stride, 0u);
            split_nibbles(row, stride, nibbles.get() + t * stride * kNibbles);
        });
        const int64_t token_blocks = (count + kBlockTokens - 1) / kBlockTokens;
        parallel_for(useful_threads(p.threads, count * p.k * p.b.n), p.b.panels() * token_blocks,
                     [&](int64_t task, int) {
                         const int64_t begin = task % token_blocks * kBlockTokens;
                         const int tokens = static_cast<int>(std::min<int64_t>(kBlockTokens, count - begin));
                         run_panel(p, task / token_blocks, first, begin, tokens, a.get(), nibbles.get());
                     });
    }
    return kOk;
}

constexpr int kFormats = 4;
constexpr int64_t kFormatBytes[kFormats] = {4, 2, 2, 8};

// Calls body(set, row, words of a row) for all rows of packing, or of the way back. Returns a Status.
template <typename Body>
int64_t by_row(int level, int threads, int format, const void* from, const void* to, int64_t rows, int64_t k,
               const Body& body) {
    const KernelSet* set = kernel_set(level);
    if (!set) return kNoLevel;
    if (threads < 1 || format < 0 || format >= kFormats || rows < 0 || k < 0) return kBadArgument;
    if (rows == 0 || k == 0) return kOk;
    if (!from || !to) return kBadArgument;
    const int64_t row_words = (k + kWordBits - 1) / kWordBits;
    parallel_for(useful_threads(threads, rows * k), rows, [&](int64_t row, int) { body(*set, row, row_words); });
    return kOk;
}

}  // namespace
}  // namespace fbitrain

// a [m][ceil(k / 32)], b [n][ceil(k / 32)], out int32 [m][n], contiguous; bits past k are 0. Returns a Status.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_xnor_gemm(int level, int threads, const void* a, const void* b, void* out,
                                                      int64_t m, int64_t n, int64_t k) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (!set) return kNoLevel;
    if (threads < 1 || m < 0 || n < 0 || k < 0 || k > kMaxColumns) return kBadArgument;
    if (m == 0 || n == 0) return kOk;
    if (!out || (k > 0 && (!a || !b))) return kBadArgument;
    const Weight weight{static_cast<const uint32_t*>(b), n, (k + kWordBits - 1) / kWordBits};
    try {
        return multiply({*set, threads, static_cast<const uint32_t*>(a), weight, static_cast<int32_t*>(out), m, k});
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

// w [rows][k] of a Format (pack.inl) -> words [rows][ceil(k / 32)]. Returns a Status.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_pack_signs(int level, int threads, int format, const void* w, void* words,
                                                       int64_t rows, int64_t k) noexcept {
    using namespace fbitrain;
    return by_row(level, threads, format, w, words, rows, k, [=](const KernelSet& set, int64_t row, int64_t row_words) {
        set.pack_row(format, static_cast<const char*>(w) + row * k * kFormatBytes[format], k,
                     static_cast<uint32_t*>(words) + row * row_words);
    });
}

// words [rows][ceil(k / 32)] -> out [rows][k] of a Format. Returns a Status.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_unpack_signs(int level, int threads, int format, const void* words,
                                                         void* out, int64_t rows, int64_t k) noexcept {
    using namespace fbitrain;
    return by_row(level, threads, format, words, out, rows, k,
                  [=](const KernelSet& set, int64_t row, int64_t row_words) {
                      set.unpack_row(format, static_cast<const uint32_t*>(words) + row * row_words, k,
                                     static_cast<char*>(out) + row * k * kFormatBytes[format]);
                  });
}
