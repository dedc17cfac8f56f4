// y = x times the transpose of alpha * sign(W) + beta: what lies around the block functions. Activations are made ready
// once per token; then each panel of 64 rows is a task of its own, whose sums are scaled and written at its end.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "linear.h"
#include "threads.h"

namespace fbitrain {
namespace {

// Tokens made ready at a time, which bounds the memory: 1 byte per column and token of int8, 8 or 16 of float tables.
constexpr int kInt8Tokens = 8 * kMaxTokens, kFloatTokens = 24;

struct Token {
    float scale;  // int8: what one step of the quantized values is worth
    float shift;  // column: sum of x * beta; row and tensor: sum of x
};

// The tokens of one slab, ready for the block functions.
struct Ready {
    Buffer<Token> tokens;
    Buffer<int8_t> quantized;  // [tokens][token_stride], in int8 mode
    Buffer<int32_t> totals;    // [tokens][groups]: sums of the quantized values
    Buffer<float> tables;      // [tokens][token_stride], in float mode
    Buffer<float> scratch;     // [threads][padded]

    Ready(const Linear& p, int64_t count) : tokens(allocate<Token>(count)) {
        if (p.mode == kInt8Mode) {
            quantized = allocate<int8_t>(count * p.token_stride());
            totals = allocate<int32_t>(count * p.groups());
        } else {
            tables = allocate<float>(count * p.token_stride());
        }
        scratch = allocate<float>(p.threads * p.padded());
    }
};

void read_token(const Linear& p, int64_t token, float* z) {
    if (p.bfloat16) {
        const auto* x = static_cast<const uint16_t*>(p.x) + token * p.k;
        for (int64_t i = 0; i < p.k; ++i) z[i] = from_bfloat16(x[i]);
    } else {
        std::memcpy(z, static_cast<const float*>(p.x) + token * p.k, sizeof(float) * p.k);
    }
    std::fill(z + p.k, z + p.padded(), 0.0f);
}

float shift_of(const Linear& p, const float* x) {
    if (!p.beta) return 0.0f;
    if (p.scale != kColumn) return sum_of(p.k, [&](int64_t i) { return x[i]; });
    return sum_of(p.k, [&](int64_t i) { return x[i] * p.parameter(p.beta, i); });
}

// Sums of the quantized values, whose order within a word does not matter: groups are whole words.
void total_groups(const Linear& p, const int8_t* q, int32_t* totals) {
    const int64_t size = p.scale == kGroup ? p.group_size : p.padded();
    for (int64_t g = 0; g < p.groups(); ++g, q += size) {
        int32_t total = 0;
        for (int64_t i = 0; i < size; ++i) total += q[i];
        totals[g] = total;
    }
}

// From the order of int8_block to that of int8_rows; the four columns of an i stay together.
void order_by_rows(const Linear& p, int8_t* q, float* scratch) {
    const int64_t chunk = p.set.chunk_words, n_words = p.token_stride() / kWordBits;
    std::memset(q + p.padded(), 0, static_cast<size_t>(p.token_stride() - p.padded()));
    auto* from = reinterpret_cast<char*>(scratch);
    std::memcpy(from, q, static_cast<size_t>(p.token_stride()));
    for (int64_t w = 0; w < n_words; ++w)
        for (int64_t j = 0; j < 8; ++j)
            std::memcpy(q + (w / chunk * chunk * 8 + j * chunk + w % chunk) * 4, from + (w * 8 + j) * 4, 4);
}

// Makes token `first + t` ready as number t of the slab; false if int8 mode finds NaN or infinity in it.
bool prepare(const Linear& p, int64_t first, int64_t t, float* z, Ready& ready) {
    read_token(p, first + t, z);
    Token& token = ready.tokens[t];
    token.shift = shift_of(p, z);
    if (p.scale == kColumn)
        for (int64_t i = 0; i < p.k; ++i) z[i] *= p.parameter(p.alpha, i);
    if (p.mode == kInt8Mode) {
        int8_t* q = ready.quantized.get() + t * p.token_stride();
        token.scale = quantize(z, p.padded(), q);
        if (!std::isfinite(token.scale)) return false;
        total_groups(p, q, ready.totals.get() + t * p.groups());
        if (p.by_rows()) order_by_rows(p, q, z);
    } else {
        token.scale = 1.0f;
        p.set.float_tables(z, static_cast<int>(p.weight.padded_words()), ready.tables.get() + t * p.token_stride());
    }
    return true;
}

// The sums of one panel and up to kMaxTokens tokens, of one group at a time where there are groups.
class PanelSums {
public:
    PanelSums(const Linear& p, const Ready& ready, int64_t panel, int64_t first, int tokens)
        : p_(p), ready_(ready), panel_(panel), first_(first), tokens_(tokens) {}

    // Writes the panel's part of y; `row_of_y` is the number of the slab's first token.
    void run(int64_t row_of_y) {
        std::fill_n(&result_[0][0], tokens_ * kRows, 0.0f);
        clear();
        if (p_.by_rows())
            add_rows();
        else
            add_blocks();
        if (p_.scale != kGroup) finish_sums(0, nullptr);
        for (int t = 0; t < tokens_; ++t) write(t, row_of_y + first_ + t);
    }

private:
    void clear() {
        std::memset(int_sums_, 0, sizeof(int32_t) * tokens_ * kRows);
        std::memset(float_sums_, 0, sizeof(float) * tokens_ * kRows);
    }

    void add_rows() {
        const uint32_t* rows = p_.weight.words + panel_ * kRows * p_.weight.row_words;
        for (int t = 0; t < tokens_; ++t)
            p_.set.int8_rows(rows, p_.weight.row_words, p_.weight.rows_of(panel_),
                             ready_.quantized.get() + (first_ + t) * p_.token_stride(), int_sums_[t]);
    }

    void add_blocks() {
        for (int64_t word = 0; word < p_.weight.padded_words();) {
            const int n_words = p_.weight.read(p_.set, panel_, word, bits_);
            if (p_.scale == kGroup)
                add_groups(word, n_words);
            else
                add(bits_, word, n_words);
            word += n_words;
        }
    }

    void add(const uint32_t* bits, int64_t word, int n_words) {
        const int64_t stride = p_.token_stride(), start = first_ * stride;
        if (p_.mode == kInt8Mode)
            p_.set.int8_block(bits, n_words, ready_.quantized.get() + start + word * kWordBits, stride, tokens_,
                              &int_sums_[0][0]);
        else
            p_.set.float_block(bits, n_words, ready_.tables.get() + start + word * p_.set.floats_per_word, stride,
                               tokens_, &float_sums_[0][0]);
    }

    // The words of the panel that belong to one group at a time; zeros past the row's end belong to none.
    void add_groups(int64_t word, int n_words) {
        const int64_t group_words = p_.group_size / kWordBits, end = std::min(word + n_words, p_.weight.row_words);
        for (int64_t w = word; w < end;) {
            const int64_t group = w / group_words, stop = std::min(end, (group + 1) * group_words);
            add(bits_ + (w - word) * kRows, w, static_cast<int>(stop - w));
            w = stop;
            if (w % group_words == 0) {
                float alpha[kRows] = {};
                for (int r = 0; r < p_.weight.rows_of(panel_); ++r)
                    alpha[r] = p_.parameter(p_.alpha, (panel_ * kRows + r) * p_.groups() + group);
                finish_sums(group, alpha);
                clear();
            }
        }
    }

    // Moves the sums of a group (all of K without groups) to the result, times its alpha if there is one. The block
    // functions of int8 sum over the bits that are set: twice that minus the sum over all is the sum with signs.
    void finish_sums(int64_t group, const float* alpha) {
        for (int t = 0; t < tokens_; ++t) {
            const int32_t total = p_.mode == kInt8Mode ? ready_.totals[(first_ + t) * p_.groups() + group] : 0;
            for (int r = 0; r < kRows; ++r) {
                float value = p_.mode == kInt8Mode ? static_cast<float>(2 * int_sums_[t][r] - total) : float_sums_[t][r];
                if (alpha) value *= alpha[r];
                result_[t][r] += value;
            }
        }
    }

    void write(int t, int64_t row) {
        const Token& token = ready_.tokens[first_ + t];
        const int64_t n0 = panel_ * kRows;
        const int rows = p_.weight.rows_of(panel_);
        float* v = result_[t];
        for (int r = 0; r < rows; ++r) v[r] *= token.scale;
        if (p_.scale == kRow || p_.scale == kTensor)
            for (int r = 0; r < rows; ++r) v[r] *= p_.parameter(p_.alpha, p_.scale == kRow ? n0 + r : 0);
        if (p_.beta && p_.scale == kColumn)
            for (int r = 0; r < rows; ++r) v[r] += token.shift;
        else if (p_.beta)
            for (int r = 0; r < rows; ++r) v[r] += token.shift * p_.parameter(p_.beta, p_.scale == kRow ? n0 + r : 0);
        if (p_.bfloat16) {
            auto* y = static_cast<uint16_t*>(p_.y) + row * p_.weight.n + n0;
            for (int r = 0; r < rows; ++r) y[r] = to_bfloat16(v[r]);
        } else {
            std::memcpy(static_cast<float*>(p_.y) + row * p_.weight.n + n0, v, sizeof(float) * rows);
        }
    }

    const Linear& p_;
    const Ready& ready_;
    const int64_t panel_, first_;
    const int tokens_;
    alignas(64) uint32_t bits_[kBlockWords * kRows];
    alignas(64) int32_t int_sums_[kMaxTokens][kRows];
    alignas(64) float float_sums_[kMaxTokens][kRows];
    alignas(64) float result_[kMaxTokens][kRows];
};

}  // namespace

// A slab of tokens at a time: made ready in parallel over tokens, multiplied in parallel over panels, those of one
// weight after those of the other. Only for pattern `column` do the weights differ in what they make of a token.
int64_t multiply(const Linear* linears, int count) {
    const Linear& p = linears[0];
    const int most = p.mode == kInt8Mode ? kInt8Tokens : kFloatTokens;
    const int n_ready = p.scale == kColumn ? count : 1;
    std::vector<Ready> ready;
    for (int i = 0; i < n_ready; ++i) ready.emplace_back(linears[i], std::min<int64_t>(p.m, most));
    int64_t panels = 0, rows = 0;
    for (int i = 0; i < count; ++i) panels += linears[i].weight.panels(), rows += linears[i].weight.n;
    for (int64_t first = 0; first < p.m; first += most) {
        const int64_t tokens = std::min<int64_t>(most, p.m - first), work = tokens * p.k;
        std::atomic<int64_t> refused{0};  // 1 + the token that is not finite
        parallel_for(useful_threads(p.threads, work * n_ready), tokens * n_ready, [&](int64_t task, int thread) {
            const int64_t t = task / n_ready, i = task % n_ready;
            float* scratch = ready[i].scratch.get() + thread * p.padded();
            if (!prepare(linears[i], first, t, scratch, ready[i])) refused = first + t + 1;
        });
        if (refused) return refused;
        const int64_t token_blocks = (tokens + kMaxTokens - 1) / kMaxTokens;
        parallel_for(useful_threads(p.threads, work * rows), panels * token_blocks, [&](int64_t task, int) {
            const int64_t begin = task % token_blocks * kMaxTokens;
            int64_t panel = task / token_blocks, i = 0;
            for (; panel >= linears[i].weight.panels(); ++i) panel -= linears[i].weight.panels();
            const int in_block = static_cast<int>(std::min<int64_t>(kMaxTokens, tokens - begin));
            PanelSums(linears[i], ready[n_ready == 1 ? 0 : i], panel, begin, in_block).run(first);
        });
    }
    return kOk;
}

}  // namespace fbitrain

// x [m][k] and y [m][n] of float32 or bfloat16; words [n][ceil(k / 32)]; alpha and beta (null: none) float32 in the shape
// of `scale`; all contiguous. group_size is read for groups only, a multiple of 32 that divides k. Returns a Status, or
// 1 + the number of a token that holds NaN or infinity, in int8 mode; y is then unspecified.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_binary_linear(int level, int threads, int mode, int bfloat16, int scale, const void* x,
                                          const void* words, const float* alpha, const float* beta, void* y, int64_t m,
                                          int64_t n, int64_t k, int64_t group_size) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (!set) return kNoLevel;
    const bool known = (mode == kFloatMode || mode == kInt8Mode) && scale >= kColumn && scale <= kGroup;
    if (!known || threads < 1 || m < 0 || n < 0 || k < 1 || k > kMaxColumns) return kBadArgument;
    if (scale == kGroup && (beta || group_size < kWordBits || group_size % kWordBits || k % group_size))
        return kBadArgument;
    if (m == 0 || n == 0) return kOk;
    if (!x || !words || !alpha || !y) return kBadArgument;
    const Weight weight{static_cast<const uint32_t*>(words), n, (k + kWordBits - 1) / kWordBits};
    try {
        const Linear linear{*set, threads, mode, bfloat16, scale, x, weight, alpha, beta, y, m, k, group_size};
        return multiply(&linear, 1);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}
