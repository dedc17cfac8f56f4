// y = x times the transpose of alpha * sign(W) + beta: what lies around the block functions. Activations are made ready
// once per token; then each panel of 64 rows is a task of its own, whose sums are scaled and written at its end.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <vector>

#include "activations.h"
#include "linear.h"
#include "salient.h"
#include "threads.h"
#include "tokens.h"

namespace fbitrain {
namespace {

// Tokens made ready at a time, which bounds the memory: 1 byte per column and token of int8, 8 or 16 of float tables.
constexpr int kInt8Tokens = 8 * kMaxTokens, kFloatTokens = 24;

// The sums of one panel and up to kMaxTokens tokens, of one group at a time where there are groups.
class PanelSums {
public:
    PanelSums(const Linear& p, const Ready& ready, int64_t panel, int64_t first, int tokens)
        : p_(p), ready_(ready), panel_(panel), first_(first), tokens_(tokens) {
        if (p.salient) salient_.emplace(p, ready, panel, first, tokens);
    }

    // Writes the panel's part of y; `row_of_y` is the number of the slab's first token. False if salient entries are no
    // rows.
    bool run(int64_t row_of_y) {
        std::fill_n(&result_[0][0], tokens_ * kRows, 0.0f);
        clear();
        if (p_.by_rows())
            add_rows();
        else
            add_blocks();
        if (p_.scale != kGroup) finish_sums(0, nullptr);
        for (int t = 0; t < tokens_; ++t) write(t, row_of_y + first_ + t);
        return entries_hold_;
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
        add_salient(p_.weight.row_words);
    }

    void add_blocks() {
        for (int64_t word = 0; word < p_.weight.padded_words();) {
            const int n_words = p_.weight.read(p_.set, panel_, word, bits_);
            for (int begin = 0; begin < n_words; begin += kBlockWords) {
                const int width = std::min(kBlockWords, n_words - begin);
                if (p_.scale == kGroup)
                    add_groups(bits_ + begin * kRows, word + begin, width);
                else
                    add(bits_ + begin * kRows, word + begin, width);
            }
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
        const int64_t end = word + n_words;
        if (p_.scale == kGroup || end % kSalientWords == 0 || end == p_.weight.padded_words()) add_salient(end);
    }

    void add_salient(int64_t end_word) {
        if (salient_) entries_hold_ &= salient_->add(end_word * kWordBits);
    }

    // The words of the panel that belong to one group at a time; zeros past the row's end belong to none.
    void add_groups(const uint32_t* bits, int64_t word, int n_words) {
        const int64_t group_words = p_.group_size / kWordBits, end = std::min(word + n_words, p_.weight.row_words);
        for (int64_t w = word; w < end;) {
            const int64_t group = w / group_words, stop = std::min(end, (group + 1) * group_words);
            add(bits + (w - word) * kRows, w, static_cast<int>(stop - w));
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
            const auto total = static_cast<uint32_t>(
                p_.mode == kInt8Mode ? ready_.totals[(first_ + t) * p_.groups() + group] : 0);
            for (int r = 0; r < kRows; ++r) {
                // The result fits, but twice the sum may not: modulo 2^32.
                const auto signed_sum = static_cast<int32_t>(2 * static_cast<uint32_t>(int_sums_[t][r]) - total);
                float value = p_.mode == kInt8Mode ? static_cast<float>(signed_sum) : float_sums_[t][r];
                if (salient_) {  // of these weights the bits must not count
                    const double all = p_.mode == kInt8Mode ? signed_sum : static_cast<double>(float_sums_[t][r]);
                    value = static_cast<float>(all - salient_->signs(t, r));
                }
                if (alpha) value *= alpha[r];
                result_[t][r] += value;
            }
        }
        if (salient_) salient_->clear_signs();
    }

    void write(int t, int64_t row) {
        const Token& token = ready_.tokens[first_ + t];
        const int64_t n0 = panel_ * kRows;
        const int rows = p_.weight.rows_of(panel_);
        float* v = result_[t];
        if (salient_) scale_salient(t, v);
        for (int r = 0; r < rows; ++r) v[r] *= token.scale;
        if (!salient_ && (p_.scale == kRow || p_.scale == kTensor))
            for (int r = 0; r < rows; ++r) v[r] *= p_.parameter(p_.alpha, p_.scale == kRow ? n0 + r : 0);
        if (p_.mixture) scale_mixture(row, v);
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

    // The bits' sums times alpha, plus the salient sums: in the reference's order, before the token's scale.
    void scale_salient(int t, float* v) const {
        for (int r = 0; r < p_.weight.rows_of(panel_); ++r) {
            const int64_t n = panel_ * kRows + r;
            if (p_.scale == kRow) v[r] *= p_.parameter(p_.alpha, n);
            const float sum = static_cast<float>(salient_->values(t, r));
            v[r] += p_.salient->value_scale ? sum * p_.salient->value_scale[n] : sum;
        }
    }

    void scale_mixture(int64_t row, float* v) const {
        float factor[kRows];
        const int rows = p_.weight.rows_of(panel_);
        const float* gates = p_.mixture->gates + row * p_.mixture->experts;
        mix(p_, p_.mixture->alpha_out, p_.weight.n, panel_ * kRows, rows, gates, factor);
        for (int r = 0; r < rows; ++r) v[r] *= factor[r];
    }

    const Linear& p_;
    const Ready& ready_;
    const int64_t panel_, first_;
    const int tokens_;
    std::optional<SalientSums> salient_;
    bool entries_hold_ = true;
    alignas(64) uint32_t bits_[kReadWords * kRows];
    alignas(64) int32_t int_sums_[kMaxTokens][kRows];
    alignas(64) float float_sums_[kMaxTokens][kRows];
    alignas(64) float result_[kMaxTokens][kRows];
};

void keep_least(std::atomic<int64_t>& least, int64_t value) {
    int64_t seen = least;
    while (value < seen && !least.compare_exchange_weak(seen, value)) {
    }
}

}  // namespace

// A slab of tokens at a time: made ready in parallel over tokens, multiplied in parallel over panels, those of one
// weight after those of the other. Only for pattern `column` do the weights differ in what they make of a token; of the
// others, one that has a shift makes for all what shifts need.
int64_t multiply(const Linear* linears, int count) {
    const Linear& p = linears[0];
    const Linear* shared = std::find_if(linears, linears + count, [](const Linear& linear) { return linear.beta; });
    if (p.scale == kColumn || shared == linears + count) shared = linears;
    const int most = p.mode == kInt8Mode ? kInt8Tokens : kFloatTokens;
    const int n_ready = p.scale == kColumn ? count : 1;
    std::vector<Ready> ready;
    for (int i = 0; i < n_ready; ++i) ready.emplace_back(shared[i], std::min<int64_t>(p.m, most));
    int64_t panels = 0, rows = 0;
    for (int i = 0; i < count; ++i) panels += linears[i].weight.panels(), rows += linears[i].weight.n;
    for (int64_t first = 0; first < p.m; first += most) {
        const int64_t tokens = std::min<int64_t>(most, p.m - first), work = tokens * p.k;
        std::atomic<int64_t> refused{tokens};  // the first token that is not finite
        parallel_for(useful_threads(p.threads, work * n_ready), tokens * n_ready, [&](int64_t task, int thread) {
            const int64_t t = task / n_ready, i = task % n_ready;
            float* scratch = ready[i].scratch.get() + thread * p.padded();
            if (!prepare(shared[i], first, t, scratch, ready[i])) keep_least(refused, t);
        });
        if (refused < tokens) return first + refused + 1;
        const int64_t block = p.salient ? kSalientTokens : kMaxTokens, token_blocks = (tokens + block - 1) / block;
        std::atomic<bool> entries_hold{true};
        parallel_for(useful_threads(p.threads, work * rows), panels * token_blocks, [&](int64_t task, int) {
            const int64_t begin = task % token_blocks * block;
            int64_t panel = task / token_blocks, i = 0;
            for (; panel >= linears[i].weight.panels(); ++i) panel -= linears[i].weight.panels();
            const int in_block = static_cast<int>(std::min<int64_t>(block, tokens - begin));
            PanelSums sums(linears[i], ready[n_ready == 1 ? 0 : i], panel, begin, in_block);
            if (!sums.run(first)) entries_hold = false;
        });
        if (!entries_hold) return kBadEntries;
    }
    return kOk;
}

}  // namespace fbitrain
