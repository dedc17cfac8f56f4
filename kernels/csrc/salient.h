// The salient weights of a panel: entries of its rows, taken up as far as the bits have come.
#pragma once

#include "linear.h"
#include "tokens.h"

namespace fbitrain {

// Tokens that a panel's sums hold at a time where there are salient weights: whole tiles of tokens side by side.
constexpr int kSalientTokens = kMaxTokens / kSalientLanes * kSalientLanes;

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
    struct Entries {
        int count;
        int32_t column[kSalientEntries];
        float value[kSalientEntries], sign[kSalientEntries];
    };
    void decode(int r, int64_t end, Entries& entries);
    void add_row(int r, const Entries& entries);

    const Linear& p_;
    const Ready& ready_;
    const int64_t panel_, first_;
    const int tokens_;
    bool ascending_ = true;
    int32_t next_[kRows];      // entry of each row
    int64_t previous_[kRows];  // column of the entry before it
    double values_[kSalientTokens][kRows], signs_[kSalientTokens][kRows];
};

}  // namespace fbitrain
