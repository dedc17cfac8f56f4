// Salient weights: what they add to a panel's sums, and what the bits at their places must not.
#include "salient.h"

#include <algorithm>

namespace fbitrain {
namespace {

// Columns as int32; how many of the first n are left of `end`, or -1 if they do not ascend from beyond `previous`.
template <typename Column>
int take_columns(const Column* columns, int64_t n, int64_t end, int64_t previous, int32_t* out) {
    n = std::lower_bound(columns, columns + n, end, [](Column a, int64_t b) { return a < b; }) - columns;
    if (n == 0) return 0;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(columns[i]);
    int32_t falls = columns[0] <= previous || columns[0] >= end || columns[n - 1] >= end;
    // Signed, of which the compiler makes vectors: one beyond int32 is negative, and so less than the one before it.
    for (int64_t i = 1; i < n; ++i) falls |= out[i - 1] >= out[i];
    return falls ? -1 : static_cast<int>(n);
}

}  // namespace

SalientSums::SalientSums(const Linear& p, const Ready& ready, int64_t panel, int64_t first, int tokens)
    : p_(p), ready_(ready), panel_(panel), first_(first), tokens_(tokens) {
    const int rows = p.weight.rows_of(panel);
    std::copy_n(p.salient->row_starts + panel * kRows, rows, next_);
    std::fill_n(previous_, rows, -1);
    std::fill_n(&values_[0][0], tokens * kRows, 0.0);
    clear_signs();
}

void SalientSums::clear_signs() { std::fill_n(&signs_[0][0], tokens_ * kRows, 0.0); }

bool SalientSums::add(int64_t end) {
    SalientEntries entries;
    for (int r = 0; r < p_.weight.rows_of(panel_); ++r) {
        int n = kSalientEntries;
        while (n == kSalientEntries) {
            n = next_entries(r, std::min(end, p_.k), entries);
            if (n < 0) return false;
            if (n > 0) add_row(r, entries, n);
        }
        if (end >= p_.k && next_[r] != p_.salient->row_starts[panel_ * kRows + r + 1]) return false;
    }
    return true;
}

// Takes the next entries of row r that are left of `end`, and returns how many; -1 if they do not ascend.
int SalientSums::next_entries(int r, int64_t end, SalientEntries& entries) {
    const Salient& salient = *p_.salient;
    const int64_t row = panel_ * kRows + r, begin = next_[r];
    const int64_t most = std::min<int64_t>(kSalientEntries, salient.row_starts[row + 1] - begin);
    const int n = salient.wide ? take_columns(static_cast<const uint32_t*>(salient.columns) + begin, most, end,
                                              previous_[r], entries.column)
                               : take_columns(static_cast<const uint16_t*>(salient.columns) + begin, most, end,
                                              previous_[r], entries.column);
    if (n <= 0) return n;
    const bool float16 = !salient.value_scale;
    p_.set.salient_decode(static_cast<const char*>(salient.values) + begin * (float16 ? 2 : 1), float16,
                          p_.weight.words + row * p_.weight.row_words, n, entries);
    next_[r] += n;
    previous_[r] = entries.column[n - 1];
    return n;
}

void SalientSums::add_row(int r, const SalientEntries& entries, int n) {
    float values[kSalientLanes], signs[kSalientLanes];
    for (int t = 0; t < tokens_; t += ready_.lanes) {
        p_.set.salient_sums(entries, n, ready_.plain_tile(p_, (first_ + t) / ready_.lanes), ready_.lanes, values,
                            signs);
        for (int lane = 0; lane < std::min(ready_.lanes, tokens_ - t); ++lane) {
            values_[t + lane][r] += values[lane];
            signs_[t + lane][r] += signs[lane];
        }
    }
}

}  // namespace fbitrain
