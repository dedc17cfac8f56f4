// Reading a weight's rows as panels: whole ones straight from memory, those at the edges through a copy with zeros.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace fbitrain {

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Bytes between one token's data and the next, beyond their size. A distance of a multiple of 4096 would put the tokens
// of a tile at addresses that the L1 cache takes for one another: half the speed.
constexpr int kSkew = 64;

// Words of a row transposed at a time. So many that the rows of a panel are a few long streams to the memory, and few
// enough for the 64 rows (32 KiB) to stay in a cache near by.
constexpr int kReadWords = 8 * kBlockWords;

struct Weight {
    const uint32_t* words;  // [n][row_words]
    int64_t n, row_words;
    // The panels as `lookup_panels` takes them, [panels][padded_words][kRows], or null.
    const uint32_t* interleaved = nullptr;

    int64_t panels() const { return (n + kRows - 1) / kRows; }
    int rows_of(int64_t panel) const { return static_cast<int>(std::min<int64_t>(kRows, n - panel * kRows)); }
    int64_t padded_words() const { return round_up(row_words, kLoadWords); }

    // Words first .. first + kReadWords of a panel's rows, fewer at the end of a row; returns how many.
    int read(const KernelSet& set, int64_t panel, int64_t first, uint32_t* out) const {
        const int n_words = static_cast<int>(std::min<int64_t>(kReadWords, padded_words() - first));
        const uint32_t* from = words + panel * kRows * row_words + first;
        const int rows = rows_of(panel);
        const int present = static_cast<int>(std::min<int64_t>(n_words, row_words - first));
        if (rows == kRows && present == n_words) {
            set.transpose(from, row_words, n_words, out);
            return n_words;
        }
        for (int begin = 0; begin < n_words; begin += kBlockWords) {
            const int width = std::min(kBlockWords, n_words - begin), filled = std::min(width, present - begin);
            uint32_t edge[kRows * kBlockWords] = {};
            for (int r = 0; r < rows; ++r)
                std::memcpy(edge + r * kBlockWords, from + r * row_words + begin, sizeof(uint32_t) * filled);
            set.transpose(edge, kBlockWords, width, out + begin * kRows);
        }
        return n_words;
    }
};

}  // namespace fbitrain
