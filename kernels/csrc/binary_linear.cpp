// y = x times the transpose of alpha * sign(W) + beta: what lies around the block functions. Activations are made ready
// once per token; then each panel of 64 rows is a task of its own, whose sums are scaled and written at its end.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <initializer_list>
#include <optional>
#include <vector>

#include "activations.h"
#include "linear.h"
#include "salient.h"
#include "threads.h"
#include "tokens.h"

namespace fbitrain {
namespace {

constexpr int kWriteAhead = 6;  // tokens
constexpr int64_t kReadyWorth = 256;  // binary weights that take as long as making a column of a token ready

// The sums of one panel and a block of tokens, of one group at a time where there are groups.
class PanelSums {
public:
    PanelSums(const Linear& p, const Ready& ready, int64_t panel, int64_t first, int tokens)
        : p_(p), ready_(ready), panel_(panel), first_(first), tokens_(tokens) {
        if (p.salient) salient_.emplace(p, ready, panel, first, tokens);
        read_scales();
    }

    // Writes the panel's part of y; `row_of_y` is the number of the slab's first token. False if salient entries are no
    // rows. With lookups and without groups and salient weights, `beside` may be another panel of the weight, to be
    // done in the same pass.
    bool run(int64_t row_of_y, PanelSums* beside = nullptr) {
        clear();
        if (beside) beside->clear();
        if (p_.scale == kGroup) std::fill_n(&result_[0][0], tokens_ * kRows, 0.0f);
        if (ready_.plan.form == Form::kInt8Rows)
            add_rows();
        else
            add_blocks(beside);
        write_all(row_of_y);
        if (beside) beside->write_all(row_of_y);
        return entries_hold_;
    }

private:
    void look_up(std::initializer_list<const uint32_t*> panels, int64_t word, int n_words,
                 std::initializer_list<int32_t*> sums) const {
        const int64_t stride = ready_.plan.stride, first = first_ * ready_.plan.rows;
        const uint8_t* tables = ready_.lookups.get() + first * stride + word * p_.set.lookup_bytes;
        p_.set.lookup_panels(panels.begin(), static_cast<int>(panels.size()), n_words, tables, stride,
                             ready_.flags.get() + first, tokens_ * ready_.plan.rows, sums.begin());
    }

    void write_all(int64_t row_of_y) {
        for (int t = 0; t < tokens_; ++t) {
            if (t + kWriteAhead < tokens_) fetch(row_of_y + first_ + t + kWriteAhead);
            write(t, row_of_y + first_ + t);
        }
    }

    // The lines of y that a token's part is to be written to, each token's in another page.
    void fetch(int64_t row) const {
        for (int byte = 0; byte < kRows * 4; byte += 64) __builtin_prefetch(place_in_y(row) + byte, 1);
    }

    void clear() { std::memset(&sums_, 0, sizeof(int32_t) * tokens_ * ready_.plan.rows * kRows); }

    void add_rows() {
        const uint32_t* rows = p_.weight.words + panel_ * kRows * p_.weight.row_words;
        for (int t = 0; t < tokens_; ++t)
            p_.set.int8_rows(rows, p_.weight.row_words, p_.weight.rows_of(panel_),
                             ready_.quantized.get() + (first_ + t) * ready_.plan.stride, sums_.ints[t]);
        add_salient(p_.weight.row_words);
    }

    // Words of the panel from `word` on, as the block functions take them; fewer at the end of a row.
    const uint32_t* read(int64_t word, int& n_words) {
        const bool interleaved = ready_.plan.form == Form::kLookupPanels;
        if (interleaved && p_.weight.interleaved) {
            n_words = static_cast<int>(std::min<int64_t>(kReadWords, p_.weight.padded_words() - word));
            return p_.weight.interleaved + (panel_ * p_.weight.padded_words() + word) * kRows;
        }
        n_words = p_.weight.read(p_.set, panel_, word, bits_);
        if (interleaved) p_.set.interleave(bits_, n_words);
        return bits_;
    }

    void add_blocks(PanelSums* beside) {
        int n_words = 0;
        for (int64_t word = 0; word < p_.weight.padded_words(); word += n_words) {
            const uint32_t* const here = read(word, n_words);
            const uint32_t* const there = beside ? beside->read(word, n_words) : nullptr;
            // All at once for lookup_panels, which cuts blocks where it needs them; salient sums are added on the way.
            const int most = ready_.plan.form == Form::kLookupPanels && !salient_ ? n_words : kBlockWords;
            for (int begin = 0; begin < n_words; begin += most) {
                const int width = std::min(most, n_words - begin);
                const uint32_t* bits = here + begin * kRows;
                if (beside)
                    look_up({bits, there + begin * kRows}, word + begin, width,
                            {&sums_.ints[0][0], &beside->sums_.ints[0][0]});
                else if (p_.scale == kGroup)
                    add_groups(bits, word + begin, width);
                else
                    add(bits, word + begin, width);
            }
        }
    }

    void add(const uint32_t* bits, int64_t word, int n_words) {
        const int64_t stride = ready_.plan.stride, start = first_ * stride;
        if (ready_.plan.form == Form::kLookupPanels)
            look_up({bits}, word, n_words, {&sums_.ints[0][0]});
        else if (p_.mode == kInt8Mode)
            p_.set.int8_block(bits, n_words, ready_.quantized.get() + start + word * kWordBits, stride, tokens_,
                              &sums_.ints[0][0]);
        else
            p_.set.float_block(bits, n_words, ready_.tables.get() + start + word * p_.set.floats_per_word, stride,
                               tokens_, &sums_.floats[0][0]);
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
                finish_group(group, alpha);
                clear();
            }
        }
    }

    // Adds the sums of a group to the result, times its alpha.
    void finish_group(int64_t group, const float* alpha) {
        for (int t = 0; t < tokens_; ++t) {
            float v[kRows];
            read_sums(t, group, v);
            for (int r = 0; r < kRows; ++r) result_[t][r] += v[r] * alpha[r];
        }
        if (salient_) salient_->clear_signs();
    }

    // A token's sums over a group (all of K without groups), of salient weights less what their bits stand for.
    void read_sums(int t, int64_t group, float* v) const {
        if (ready_.plan.rows == kDigits) return join_digits(t, group, v);
        if (p_.mode == kFloatMode) {
            std::copy_n(sums_.floats[t], kRows, v);
            if (salient_)
                for (int r = 0; r < kRows; ++r) v[r] = static_cast<float>(double{v[r]} - salient_->signs(t, r));
            return;
        }
        // The block functions sum over the bits that are set: twice that minus the total is the sum with signs. It
        // fits, but twice the sum may not: modulo 2^32.
        const auto total = static_cast<uint32_t>(ready_.totals[(first_ + t) * p_.groups() + group]);
        const auto with_signs = [&](int r) {
            return static_cast<int32_t>(2 * static_cast<uint32_t>(sums_.ints[t][r]) - total);
        };
        if (salient_)
            for (int r = 0; r < kRows; ++r) v[r] = static_cast<float>(with_signs(r) - salient_->signs(t, r));
        else
            for (int r = 0; r < kRows; ++r) v[r] = static_cast<float>(with_signs(r));
    }

    // As read_sums: the sums of the digits, which double holds exactly together.
    void join_digits(int t, int64_t group, float* v) const {
        double joined[kRows] = {};
        for (int digit = kDigits - 1; digit >= 0; --digit) {
            const int32_t* sums = sums_.ints[t * kDigits + digit];
            const double total = ready_.totals[((first_ + t) * kDigits + digit) * p_.groups() + group];
            for (int r = 0; r < kRows; ++r) joined[r] = joined[r] * 256.0 + (2.0 * sums[r] - total);
        }
        for (int r = 0; r < kRows; ++r) v[r] = static_cast<float>(joined[r]);
    }

    char* place_in_y(int64_t row) const {
        return static_cast<char*>(p_.y) + (row * p_.weight.n + panel_ * kRows) * (p_.bfloat16 ? 2 : 4);
    }

    void write(int t, int64_t row) {
        const int rows = p_.weight.rows_of(panel_);
        if (p_.mixture) mix(p_, p_.mixture->alpha_out, p_.weight.n, panel_ * kRows, rows, gates(row), factor_);
        if (rows == kRows && !p_.bfloat16) {
            finish(t, reinterpret_cast<float*>(place_in_y(row)));
            return;
        }
        float v[kRows];
        finish(t, v);
        if (p_.bfloat16) {
            auto* y = reinterpret_cast<uint16_t*>(place_in_y(row));
            for (int r = 0; r < rows; ++r) y[r] = to_bfloat16(v[r]);
        } else {
            std::memcpy(place_in_y(row), v, sizeof(float) * rows);
        }
    }

    void finish(int t, float* out) const {
        const Token& token = ready_.tokens[first_ + t];
        const float shift = p_.beta ? token.shift : 0.0f;  // which weights that share x may have, and may be infinite
        if (p_.mode == kInt8Mode && p_.scale != kGroup && !salient_) {
            p_.set.activations.finish_int8(sums_.ints[t], ready_.totals[first_ + t], token.scale, factor_, shift, beta_,
                                           out);
            return;
        }
        float v[kRows];
        if (p_.scale == kGroup)
            std::copy_n(result_[t], kRows, v);
        else
            read_sums(t, 0, v);
        if (salient_) scale_salient(t, v);
        for (int r = 0; r < kRows; ++r) out[r] = v[r] * token.scale * factor_[r] + shift * beta_[r];
    }

    // What the rows' sums are multiplied with, and the token's shift. A mixture has other factors for each token.
    void read_scales() {
        const bool by_row = p_.scale == kRow, scaled = !salient_ && (by_row || p_.scale == kTensor);
        read_scale(scaled ? p_.alpha : nullptr, by_row, 1.0f, factor_);
        read_scale(p_.scale == kColumn ? nullptr : p_.beta, by_row, p_.beta ? 1.0f : 0.0f, beta_);
    }

    // One value per row of the panel, that of all rows, or, without values, `otherwise`.
    void read_scale(const float* values, bool by_row, float otherwise, float* out) const {
        std::fill_n(out, kRows, values && !by_row ? p_.parameter(values, 0) : otherwise);
        if (!values || !by_row) return;
        for (int r = 0; r < p_.weight.rows_of(panel_); ++r) out[r] = p_.parameter(values, panel_ * kRows + r);
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

    const float* gates(int64_t row) const { return p_.mixture->gates + row * p_.mixture->experts; }

    const Linear& p_;
    const Ready& ready_;
    const int64_t panel_, first_;
    const int tokens_;
    std::optional<SalientSums> salient_;
    bool entries_hold_ = true;
    alignas(64) uint32_t bits_[kReadWords * kRows];
    alignas(64) union {  // by mode
        int32_t ints[kBlockTokens][kRows];
        float floats[kMaxTokens][kRows];
    } sums_;
    alignas(64) float result_[kMaxTokens][kRows];  // of groups, whose blocks are no larger
    alignas(64) float factor_[kRows], beta_[kRows];
};

void keep_least(std::atomic<int64_t>& least, int64_t value) {
    int64_t seen = least;
    while (value < seen && !least.compare_exchange_weak(seen, value)) {
    }
}

// A slab of tokens at a time: made ready in parallel over tokens, multiplied in parallel over panels, those of one
// weight after those of the other. Only for pattern `column` do the weights differ in what they make of a token; of the
// others, one that has a shift makes for all what shifts need.
int64_t multiply_as(const Plan& plan, const Linear* linears, int count) {
    const Linear& p = linears[0];
    const Linear* shared = std::find_if(linears, linears + count, [](const Linear& linear) { return linear.beta; });
    if (p.scale == kColumn || shared == linears + count) shared = linears;
    const int n_ready = p.scale == kColumn ? count : 1;
    // Panels of a task. One token's tables stay in a near cache anyway.
    const bool pairs = plan.form == Form::kLookupPanels && plan.slab * plan.rows > 1 && p.scale != kGroup && !p.salient;
    const int64_t together = pairs ? 2 : 1;
    const auto passes_of = [=](const Linear& linear) { return (linear.weight.panels() + together - 1) / together; };
    int64_t passes = 0, rows = 0;
    for (int i = 0; i < count; ++i) passes += passes_of(linears[i]), rows += linears[i].weight.n;
    std::vector<Ready> ready;
    for (int i = 0; i < n_ready; ++i) ready.emplace_back(shared[i], plan);
    for (int64_t first = 0; first < p.m; first += plan.slab) {
        const int64_t tokens = std::min<int64_t>(plan.slab, p.m - first), work = tokens * p.k;
        std::atomic<int64_t> refused{tokens};  // the first token that is not finite
        const int making = useful_threads(p.threads, kReadyWorth * work * n_ready);
        parallel_for(making, tokens * n_ready, [&](int64_t task, int thread) {
            const int64_t t = task / n_ready, i = task % n_ready;
            float* scratch = ready[i].scratch.get() + thread * ready[i].scratch_of(p);
            if (!prepare(shared[i], first, t, scratch, ready[i])) keep_least(refused, t);
        });
        if (refused < tokens) return first + refused + 1;
        const int64_t token_blocks = (tokens + plan.block - 1) / plan.block;
        std::atomic<bool> entries_hold{true};
        parallel_for(useful_threads(p.threads, work * rows), passes * token_blocks, [&](int64_t task, int) {
            const int64_t begin = task / passes * plan.block;  // all panels meet a block while a cache holds it
            int64_t pass = task % passes, i = 0;
            for (; pass >= passes_of(linears[i]); ++i) pass -= passes_of(linears[i]);
            const int in_block = static_cast<int>(std::min<int64_t>(plan.block, tokens - begin));
            const Ready& made = ready[n_ready == 1 ? 0 : i];
            const int64_t panel = pass * together;
            PanelSums sums(linears[i], made, panel, begin, in_block);
            if (together == 2 && panel + 1 < linears[i].weight.panels()) {
                // No std::optional: it costs 120 KB of zeros (gcc 12).
                PanelSums beside(linears[i], made, panel + 1, begin, in_block);
                sums.run(first, &beside);  // without salient entries
            } else if (!sums.run(first)) {
                entries_hold = false;
            }
        });
        if (!entries_hold) return kBadEntries;
    }
    return kOk;
}

}  // namespace

int64_t multiply(const Linear* linears, int count) {
    const Plan plan = plan_tokens(linears[0]);
    const int64_t status = multiply_as(plan, linears, count);
    if (status <= kOk || linears[0].mode != kFloatMode) return status;
    // Some token does not go into digits; NaN and infinity are for the floats' own tables.
    std::vector<Linear> plain(linears, linears + count);
    for (Linear& linear : plain) linear.weight.interleaved = nullptr;
    return multiply_as(plan_tokens(plain[0]), plain.data(), count);
}

}  // namespace fbitrain
