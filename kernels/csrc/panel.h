// Reading a weight's rows as panels: whole ones straight from memory, those at the edges through a copy with zeros.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace fbitrain {

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Bytes between one token's data and the next, beyond their size. A distance of a multiple of 4096 would put the tokens of
// a tile at addresses that the L1 cache takes for one another: half the speed.
constexpr int kSkew = 64;

struct Weight {
    const uint32_t* words;  // [n][row_words]
    int64_t n, row_words;

    int64_t panels() const { return (n + kRows - 1) / kRows; }
    int rows_of(int64_t panel) const { return static_cast<int>(std::min<int64_t>(kRows, n - panel * kRows)); }
    int64_t padded_words() const { return round_up(row_words, kLoadWords); }

    // Words first .. first + kBlockWords of a panel's rows, fewer at the end of a row; returns how many.
    int read(const KernelSet& set, int64_t panel, int64_t first, uint32_t* out) const {
        const int n_words = static_cast<int>(std::min<int64_t>(kBlockWords, padded_words() - first));
        const uint32_t* from = words + panel * kRows * row_words + first;
        const int rows = rows_of(panel);
        const int present = static_cast<int>(std::min<int64_t>(n_words, row_words - first));
        // A panel reads 64 rows side by side, a cache line of each: too many streams for the hardware to foresee.
        if (panel + 1 < panels())
            for (int r = 0; r < rows_of(panel + 1); ++r) __builtin_prefetch(from + (kRows + r) * row_words, 0, 2);
        if (rows == kRows && present == n_words) {
            set.transpose(from, row_words, n_words, out);
            return n_words;
        }
        uint32_t edge[kRows * kBlockWords] = {};
        for (int r = 0; r < rows; ++r)
            std::memcpy(edge + r * kBlockWords, from + r * row_words, sizeof(uint32_t) * present);
        set.transpose(edge, kBlockWords, n_words, out);
        return n_words;
    }
};

}  // namespace fbitrain
