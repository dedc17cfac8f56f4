// int8 by lookup with AVX2: the part of avx2.cpp where vpshufb adds up four columns at once, included there inside its
// unnamed namespace after avx2_xnor.inl, whose order of rows in a register it shares.

constexpr int kLookupBytes = kNibbles * 2 * 16;  // of tables per word

// A sum of four columns is made positive by the magnitudes of the negative ones, and then has nine bits, or ten if all
// are -128. Its low and its high part are added up in bytes. Where the high parts of any two neighbouring words fit a
// byte, tables are `narrow`: cut at four bits, so that a byte holds two words of either part; else at five, and it
// holds one.
constexpr int kNarrowBits = 4, kWideBits = 5, kNarrowWords = 2;
constexpr int low_bits(bool narrow) { return narrow ? kNarrowBits : kWideBits; }

// The most words whose sums fit 16 bits, unsigned. Two words of narrow tables add up to 255 * 16 + 16 * 15 at most, so
// 16 to 34560; 8 words of others to 256 * 128.
constexpr int lookup_words(bool narrow) { return narrow ? 16 : 8; }

// Per nibble, a lane each, the sum of its four unsigned bytes.
__m256i sum_fours(__m256i bytes) { return widen(_mm256_maddubs_epi16(bytes, _mm256_set1_epi8(1))); }
__m256i negatives(__m256i x) {  // |x|, at most 128, where x is negative, else 0
    return _mm256_and_si256(_mm256_sub_epi8(_mm256_setzero_si256(), x), _mm256_cmpgt_epi8(_mm256_setzero_si256(), x));
}

// The order of int8_block, [j][i] of columns 8 * i + j, with j < 4 or j >= 4 in either half -> [i][j]: four to a
// nibble.
__m256i by_nibbles(const int8_t* x) {
    const __m256i by_nibble = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                               0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm256_shuffle_epi8(load(x), by_nibble);
}

bool is_narrow(const int8_t* x, int n_words) {
    int previous = 0;
    for (int w = 0; w < n_words; ++w) {
        const __m256i sizes = sum_fours(_mm256_abs_epi8(by_nibbles(x + w * kWordBits)));
        const int high_parts = sum_lanes(_mm256_srli_epi32(sizes, kNarrowBits));
        if (previous + high_parts > 255) return false;
        previous = high_parts;  // sums may begin at any word
    }
    return true;
}

// For each nibble the sums of its columns that 16 patterns select, made positive: their low and their high parts. Of
// nibbles 2 * i and 2 * i + 1 come [low parts of the one][of the other][high parts of the one][of the other], 16 bytes
// each.
template <bool kNarrow>
void make_tables(const int8_t* x, int n_words, uint8_t* tables) {
    const __m256i has_ab = _mm256_set1_epi64x(0x0101010000010000);  // of columns a, b, c, d: what patterns 0 to 3 hold
    const __m256i has_c = _mm256_setr_epi64x(0, 0x0001000100010001, 0, 0x0001000100010001);
    const __m256i has_d = _mm256_set1_epi16(0x0100), low_part = _mm256_set1_epi16((1 << low_bits(kNarrow)) - 1);
    const __m256i has_cd = _mm256_or_si256(has_c, has_d);
    for (int w = 0; w < n_words; ++w) {
        const __m256i fours = by_nibbles(x + w * kWordBits), biases = sum_fours(negatives(fours));
        #pragma GCC unroll 8
        for (int i = 0; i < kNibbles / 2; ++i, tables += 64) {
            const __m256i ab = _mm256_shuffle_epi8(fours, _mm256_set1_epi16(static_cast<int16_t>(0x0100 + 0x0404 * i)));
            const __m256i cd = _mm256_shuffle_epi8(fours, _mm256_set1_epi16(static_cast<int16_t>(0x0302 + 0x0404 * i)));
            const __m256i bias =
                _mm256_shuffle_epi8(biases, _mm256_set1_epi16(static_cast<int16_t>(0x0100 + 0x0404 * i)));
            const __m256i of_ab = _mm256_add_epi16(bias, _mm256_maddubs_epi16(has_ab, ab));
            const __m256i without_d = _mm256_add_epi16(of_ab, _mm256_maddubs_epi16(has_c, cd));
            const __m256i with_d = _mm256_add_epi16(of_ab, _mm256_maddubs_epi16(has_cd, cd));
            auto* out = reinterpret_cast<__m256i*>(tables);
            _mm256_store_si256(
                out, _mm256_packus_epi16(_mm256_and_si256(without_d, low_part), _mm256_and_si256(with_d, low_part)));
            _mm256_store_si256(out + 1, _mm256_packus_epi16(_mm256_srli_epi16(without_d, low_bits(kNarrow)),
                                                            _mm256_srli_epi16(with_d, low_bits(kNarrow))));
        }
    }
}

bool lookup_tables(const int8_t* x, int n_words, uint8_t* tables) {
    const bool narrow = is_narrow(x, n_words);
    (narrow ? make_tables<true> : make_tables<false>)(x, n_words, tables);
    return narrow;
}

// Each word of a panel as four bytes of all 64 rows: two registers per byte, of the lower and the upper 32 rows.
void interleave(uint32_t* panel, int n_words) {
    for (int w = 0; w < n_words; ++w, panel += kRows) {
        __m256i bytes[2][4];
        for (int g = 0; g < 2; ++g) split_bytes(panel + g * kRows / 2, bytes[g]);
        #pragma GCC unroll 8
        for (int b = 0; b < 4; ++b)
            for (int g = 0; g < 2; ++g) _mm256_store_si256(reinterpret_cast<__m256i*>(panel) + 2 * b + g, bytes[g][b]);
    }
}

// The 16 bytes at p, in both halves of a register.
__m256i twice(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
}

// Adds to the sums of 16 rows what the unsigned 16-bit sums of `unpack` hold of them: rows 0..3, 8..11, 4..7, 12..15.
void add_words(int32_t* sums, __m256i words) {
    add_to(sums, _mm256_unpacklo_epi16(words, _mm256_setzero_si256()));
    add_to(sums + kLanes, _mm256_unpackhi_epi16(words, _mm256_setzero_si256()));
}

// Sums of 16 bits that 64 rows x kTokens have of at most lookup_words() words.
template <int kTokens, bool kNarrow>
struct LookupSums {
    __m256i sum[kTokens][2][2];
    __m256i worth[kTokens];  // of a low part and of a high part

    explicit LookupSums(const bool* narrow) {
        #pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
            worth[t] = _mm256_set1_epi16(static_cast<int16_t>(1 + (1 << (8 + low_bits(kNarrow || narrow[t])))));
            #pragma GCC unroll 8
            for (int i = 0; i < 4; ++i) sum[t][i / 2][i % 2] = _mm256_setzero_si256();  // gcc would use `rep stos`
        }
    }

    // What the bytes hold of low and of high parts.
    void add(const __m256i (&low)[kTokens][2], const __m256i (&high)[kTokens][2]) {
        #pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
            #pragma GCC unroll 8
            for (int g = 0; g < 2; ++g) {
                add_to_half(t, g, 0, _mm256_unpacklo_epi8(low[t][g], high[t][g]));
                add_to_half(t, g, 1, _mm256_unpackhi_epi8(low[t][g], high[t][g]));
            }
    }

    void add_to_half(int t, int g, int half, __m256i parts) {
        sum[t][g][half] = _mm256_add_epi16(sum[t][g][half], _mm256_maddubs_epi16(parts, worth[t]));
    }

    void add_to_rows(int32_t* sums) const {
        for (int t = 0; t < kTokens; ++t)
            for (int g = 0; g < 2; ++g)
                for (int half = 0; half < 2; ++half)
                    add_words(sums + t * kRows + g * kRows / 2 + half * kRows / 4, sum[t][g][half]);
    }
};

// sum += what `table` holds for the nibbles; the first lookup begins the sum.
void look_up(__m256i table, __m256i nibbles, bool first, __m256i& sum) {
    const __m256i found = _mm256_shuffle_epi8(table, nibbles);
    sum = first ? found : _mm256_add_epi8(sum, found);
    in_register(sum);
}

// Of what holds the bits of 64 rows: stored nibbles, a register of 32 rows each, or a panel; elements per word.
template <typename Bits>
constexpr int kPerWord = kRows;
template <>
constexpr int kPerWord<__m256i> = 2 * kNibbles;

// The next kWords words of 64 rows x kTokens: a lookup and an add do 128 halves of weights.
template <int kWords, int kTokens, bool kNarrow>
void look_up_words(const __m256i* nibbles, const uint8_t* tables, ptrdiff_t stride, LookupSums<kTokens, kNarrow>& sum) {
    __m256i low[kTokens][2], high[kTokens][2];
    #pragma GCC unroll 2
    for (int w = 0; w < kWords; ++w, nibbles += 2 * kNibbles, tables += kLookupBytes)
        #pragma GCC unroll 8
        for (int i = 0; i < kNibbles; ++i)
            #pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
                const uint8_t* table = tables + t * stride + i / 2 * 64 + i % 2 * 16;
                const __m256i low_table = twice(table), high_table = twice(table + 32);
                #pragma GCC unroll 8
                for (int g = 0; g < 2; ++g) {
                    look_up(low_table, nibbles[2 * i + g], w + i == 0, low[t][g]);
                    look_up(high_table, nibbles[2 * i + g], w + i == 0, high[t][g]);
                }
            }
    sum.add(low, high);
}

// Words of a cache line, and lines of a panel's word.
constexpr int kLine = 16, kWordLines = kRows / kLine;

// How far ahead of their use the bits of one token are fetched, in words of a panel: 2 KiB. Measured: fetched 1 to 8
// KiB ahead, bits that come from memory take 0.7 to 0.8 of the time.
constexpr int kLookupAhead = 8;

// So few tokens that nibbles are not stored: a word's sums of 64 rows, and what is looked up, fit the registers.
constexpr int kFewLookups = 3;

// The next kWords words, as above, from a panel's bits.
template <int kWords, int kTokens, bool kNarrow>
void look_up_words(const uint32_t* panel, const uint8_t* tables, ptrdiff_t stride, LookupSums<kTokens, kNarrow>& sum) {
    __m256i low[kTokens][2], high[kTokens][2];
    #pragma GCC unroll 2
    for (int w = 0; w < kWords; ++w, panel += kRows) {
        for (int line = 0; line < kWordLines; ++line) __builtin_prefetch(panel + kLookupAhead * kRows + line * kLine);
        #pragma GCC unroll 8
        for (int b = 0; b < 4; ++b, tables += 64)
            #pragma GCC unroll 8
            for (int upper = 0; upper < 2; ++upper) {
                __m256i nibbles[2];
                #pragma GCC unroll 8
                for (int g = 0; g < 2; ++g) {
                    const __m256i bytes = load(panel + (2 * b + g) * kLanes);
                    nibbles[g] = upper ? high_nibbles(bytes) : low_nibbles(bytes);
                }
                #pragma GCC unroll 8
                for (int t = 0; t < kTokens; ++t) {
                    const uint8_t* table = tables + t * stride + upper * 16;
                    const __m256i low_table = twice(table), high_table = twice(table + 32);
                    #pragma GCC unroll 8
                    for (int g = 0; g < 2; ++g) {
                        look_up(low_table, nibbles[g], w + b + upper == 0, low[t][g]);
                        look_up(high_table, nibbles[g], w + b + upper == 0, high[t][g]);
                    }
                }
            }
    }
    sum.add(low, high);
}

// 64 rows x kTokens x n_words, from nibbles that are stored or from the bits of a panel.
template <int kTokens, bool kNarrow, typename Bits>
void lookup_rows(const Bits* bits, int n_words, const uint8_t* tables, ptrdiff_t stride, const bool* narrow,
                 int32_t* sums) {
    constexpr int kWords = kNarrow ? kNarrowWords : 1, kMost = lookup_words(kNarrow), kStep = kPerWord<Bits>;
    for (int begin = 0; begin < n_words; begin += kMost) {
        const int end = n_words - begin < kMost ? n_words : begin + kMost;
        LookupSums<kTokens, kNarrow> sum(narrow);
        int w = begin;
        for (; w + kWords <= end; w += kWords)
            look_up_words<kWords>(bits + w * kStep, tables + w * kLookupBytes, stride, sum);
        for (; w < end; ++w) look_up_words<1>(bits + w * kStep, tables + w * kLookupBytes, stride, sum);
        sum.add_to_rows(sums);
    }
}

// Which of these does such tokens.
template <int kTokens, typename Bits>
auto lookup_for(const bool* narrow) {
    bool all_narrow = true;
    for (int t = 0; t < kTokens; ++t) all_narrow &= narrow[t];
    return all_narrow ? lookup_rows<kTokens, true, Bits> : lookup_rows<kTokens, false, Bits>;
}

// The nibbles of an interleaved panel, a register of 32 rows each.
void store_nibbles(const uint32_t* panel, int n_words, __m256i* nibbles) {
    for (int i = 0; i < n_words * kNibbles / 2; ++i, nibbles += 4, panel += 2 * kLanes)
        for (int g = 0; g < 2; ++g) {
            const __m256i bytes = load(panel + g * kLanes);
            nibbles[g] = low_nibbles(bytes);
            nibbles[2 + g] = high_nibbles(bytes);
        }
}

// More tokens share the nibbles, which are stored: of a block of so many words as stay in the L1 cache.
void look_up_block(const uint32_t* const* panels, int n_panels, int n_words, const uint8_t* tables, ptrdiff_t stride,
                   const bool* narrow, int tokens, int32_t* const* sums) {
    constexpr int kTogether = 2;  // more tokens do not fit the registers
    __m256i nibbles[2][kBlockWords * kNibbles * 2];
    for (int p = 0; p < n_panels; ++p) store_nibbles(panels[p], n_words, nibbles[p]);
    // The bits of the next block, which lie behind these if they come from memory, are fetched a few with each tile.
    const int lines = n_words * kWordLines, per_tile = (lines * kTogether + tokens - 1) / tokens;
    for (int t = 0, line = 0; t < tokens; t += kTogether) {
        for (int i = 0; i < per_tile && line < lines; ++i, ++line)
            for (int p = 0; p < n_panels; ++p) __builtin_prefetch(panels[p] + n_words * kRows + line * kLine);
        const auto tile =
            (tokens - t < kTogether ? lookup_for<1, __m256i> : lookup_for<kTogether, __m256i>)(narrow + t);
        for (int p = 0; p < n_panels; ++p)
            tile(nibbles[p], n_words, tables + t * stride, stride, narrow + t, sums[p] + t * kRows);
    }
}

void lookup_panels(const uint32_t* const* panels, int n_panels, int n_words, const uint8_t* tables, ptrdiff_t stride,
                   const bool* narrow, int tokens, int32_t* const* sums) {
    if (tokens <= kFewLookups) {
        constexpr decltype(&lookup_for<1, uint32_t>) few[] = {nullptr, lookup_for<1, uint32_t>, lookup_for<2, uint32_t>,
                                                              lookup_for<3, uint32_t>};
        const auto look_up_few = few[tokens](narrow);
        for (int p = 0; p < n_panels; ++p) look_up_few(panels[p], n_words, tables, stride, narrow, sums[p]);
        return;
    }
    for (int begin = 0; begin < n_words; begin += kBlockWords) {
        const uint32_t* blocks[2];
        for (int p = 0; p < n_panels; ++p) blocks[p] = panels[p] + begin * kRows;
        const int width = n_words - begin < kBlockWords ? n_words - begin : kBlockWords;
        look_up_block(blocks, n_panels, width, tables + begin * kLookupBytes, stride, narrow, tokens, sums);
    }
}
