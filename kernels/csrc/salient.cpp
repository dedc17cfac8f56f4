// Salient weights: what they add to a panel's sums, and what the bits at their places must not.
#include "salient.h"

#include <algorithm>
#include <cstring>

namespace fbitrain {
namespace {

float from_float16(uint16_t half) {
    uint32_t bits = uint32_t{half & 0x7FFFu} << 13;
    float value;
    if ((half & 0x7C00u) == 0x7C00u) bits |= 0x7F800000u;  // infinity or NaN
    std::memcpy(&value, &bits, sizeof value);
    if ((half & 0x7C00u) != 0x7C00u) value *= 0x1p112f;  // the exponents' biases, subnormal numbers included
    return half & 0x8000u ? -value : value;
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
    Entries entries;
    for (int r = 0; r < p_.weight.rows_of(panel_); ++r)
        do {
            decode(r, std::min(end, p_.k), entries);
            add_row(r, entries);
        } while (entries.count == kSalientEntries);
    if (end >= p_.k)
        for (int r = 0; r < p_.weight.rows_of(panel_); ++r)
            ascending_ &= next_[r] == p_.salient->row_starts[panel_ * kRows + r + 1];
    return ascending_;
}

// Takes the next entries of row r that are left of `end`.
void SalientSums::decode(int r, int64_t end, Entries& entries) {
    const Salient& salient = *p_.salient;
    const uint32_t* words = p_.weight.words + (panel_ * kRows + r) * p_.weight.row_words;
    const int64_t stop = salient.row_starts[panel_ * kRows + r + 1];
    int64_t entry = next_[r], previous = previous_[r];
    int n = 0;
    for (; entry < stop && n < kSalientEntries; ++entry, ++n) {
        const int64_t column = salient.wide ? static_cast<const uint32_t*>(salient.columns)[entry]
                                            : static_cast<const uint16_t*>(salient.columns)[entry];
        if (column >= end) break;
        ascending_ &= column > previous;
        previous = column;
        entries.column[n] = static_cast<int32_t>(column);
        entries.value[n] = salient.value_scale ? static_cast<float>(static_cast<const int8_t*>(salient.values)[entry])
                                               : from_float16(static_cast<const uint16_t*>(salient.values)[entry]);
        entries.sign[n] = static_cast<float>(static_cast<int>(words[column / kWordBits] >> column % kWordBits & 1u) * 2 - 1);
    }
    entries.count = n;
    next_[r] = static_cast<int32_t>(entry);
    previous_[r] = previous;
}

void SalientSums::add_row(int r, const Entries& entries) {
    float values[kSalientLanes], signs[kSalientLanes];
    for (int t = 0; t < tokens_; t += ready_.lanes) {
        p_.set.salient_sums(entries.column, entries.value, entries.sign, entries.count,
                            ready_.plain_tile(p_, (first_ + t) / ready_.lanes), ready_.lanes, values, signs);
        for (int lane = 0; lane < std::min(ready_.lanes, tokens_ - t); ++lane) {
            values_[t + lane][r] += values[lane];
            signs_[t + lane][r] += signs[lane];
        }
    }
}

}  // namespace fbitrain
