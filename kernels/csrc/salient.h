// The salient weights of a panel: entries of its rows, taken up as far as the bits have come.
#pragma once

#include "linear.h"
#include "tokens.h"

namespace fbitrain {

// Tokens that a panel's sums hold at a time where there are salient weights: whole tiles of tokens side by side.
constexpr int kSalientTokens = kMaxTokens / kSalientLanes * kSalientLanes;

// How many columns of bits are summed before their salient entries are, where no group ends earlier: x of so many
// columns and kSalientTokens tokens stays in the L2 cache, and a row has entries enough to be worth starting on.
constexpr int kSalientWords = 2048 / kWordBits;

// Sums are in double, where those of integers are exact.
class SalientSums {
public:
    // Of tokens first .. first + tokens of the slab; `first` is a multiple of kSalientLanes.
    SalientSums(const Linear& p, const Ready& ready, int64_t panel, int64_t first, int tokens);

    // Adds the entries left of column `end` that are not yet in the sums. False if they do not ascend or leave the row.
    bool add(int64_t end);

    double values(int t, int r) const { return values_[t][r]; }  // sum of value * x over all entries so far
    double signs(int t, int r) const { return signs_[t][r]; }    // sum of sign * x since the last clear_signs
    void clear_signs();

private:
    int next_entries(int r, int64_t end, SalientEntries& entries);
    void add_row(int r, const SalientEntries& entries, int n);

    const Linear& p_;
    const Ready& ready_;
    const int64_t panel_, first_;
    const int tokens_;
    int32_t next_[kRows];      // entry of each row
    int64_t previous_[kRows];  // column of the entry before it
    double values_[kSalientTokens][kRows], signs_[kSalientTokens][kRows];
};

}  // namespace fbitrain
