// int8 by lookup with AVX2: the part of avx2.cpp where vpshufb adds up four columns at once, included there inside its
// unnamed namespace after avx2_xnor.inl, whose order of rows in a register it shares.

constexpr int kLookupWords = 8;   // 256 columns: the most whose sums of int8 fit 16 bits
constexpr int kLookupBias = 512;  // makes a sum of four columns, -512 to 508, positive
constexpr int kLowBits = 5;       // of the ten bits of such a sum, so that a byte holds eight of either part
constexpr int kLookupBytes = kNibbles * 2 * 16;  // of tables per word

// For each nibble the biased sums of its columns that 16 patterns select: their low and their high five bits. Of nibbles
// 2 * i and 2 * i + 1 come [low parts of the one][of the other][high parts of the one][of the other], 16 bytes each.
void lookup_tables(const int8_t* x, int n_words, uint8_t* tables) {
    const __m256i by_nibble =  // [j][i] of columns 8 * i + j, j < 4 or j >= 4 -> [i][j]
        _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i has_ab = _mm256_set1_epi64x(0x0101010000010000);  // of columns a, b, c, d: what patterns 0 to 3 hold
    const __m256i has_c = _mm256_setr_epi64x(0, 0x0001000100010001, 0, 0x0001000100010001);
    const __m256i has_d = _mm256_set1_epi16(0x0100), low_bits = _mm256_set1_epi16((1 << kLowBits) - 1);
    const __m256i has_cd = _mm256_or_si256(has_c, has_d), bias = _mm256_set1_epi16(kLookupBias);
    for (int w = 0; w < n_words; ++w) {
        const __m256i fours = _mm256_shuffle_epi8(load(x + w * kWordBits), by_nibble);
        #pragma GCC unroll 8
        for (int i = 0; i < kNibbles / 2; ++i, tables += 64) {
            const __m256i ab = _mm256_shuffle_epi8(fours, _mm256_set1_epi16(static_cast<int16_t>(0x0100 + 0x0404 * i)));
            const __m256i cd = _mm256_shuffle_epi8(fours, _mm256_set1_epi16(static_cast<int16_t>(0x0302 + 0x0404 * i)));
            const __m256i of_ab = _mm256_add_epi16(bias, _mm256_maddubs_epi16(has_ab, ab));
            const __m256i without_d = _mm256_add_epi16(of_ab, _mm256_maddubs_epi16(has_c, cd));
            const __m256i with_d = _mm256_add_epi16(of_ab, _mm256_maddubs_epi16(has_cd, cd));
            auto* out = reinterpret_cast<__m256i*>(tables);
            _mm256_store_si256(out, _mm256_packus_epi16(_mm256_and_si256(without_d, low_bits),
                                                        _mm256_and_si256(with_d, low_bits)));
            _mm256_store_si256(out + 1, _mm256_packus_epi16(_mm256_srli_epi16(without_d, kLowBits),
                                                            _mm256_srli_epi16(with_d, kLowBits)));
        }
    }
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

// Adds to the sums of 16 rows what the 16-bit sums of `unpack` hold of them: rows 0..3, 8..11, 4..7, 12..15.
void add_words(int32_t* sums, __m256i words) {
    add_to(sums, _mm256_srai_epi32(_mm256_unpacklo_epi16(words, words), 16));
    add_to(sums + kLanes, _mm256_srai_epi32(_mm256_unpackhi_epi16(words, words), 16));
}

// Sums of 16 bits that 64 rows x kTokens have of at most kLookupWords words. The biases, 2^15 of 256 columns, are taken out
// beforehand, modulo 2^16 as all of these sums are but the last.
template <int kTokens>
struct LookupSums {
    __m256i sum[kTokens][2][2];

    explicit LookupSums(int n_words) {
        for (int t = 0; t < kTokens; ++t)
            for (int g = 0; g < 2; ++g)
                for (int half = 0; half < 2; ++half)
                    sum[t][g][half] = _mm256_set1_epi16(static_cast<int16_t>(-kLookupBias * kNibbles * n_words));
    }

    // A word's, from the byte sums of its low and its high parts.
    void add(int t, int g, __m256i low, __m256i high) {
        const __m256i worth = _mm256_set1_epi16(1 + (1 << (8 + kLowBits)));  // of a low part 1, of a high part 32
        sum[t][g][0] = _mm256_add_epi16(sum[t][g][0], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low, high), worth));
        sum[t][g][1] = _mm256_add_epi16(sum[t][g][1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low, high), worth));
    }

    void add_to_rows(int32_t* sums) const {
        for (int t = 0; t < kTokens; ++t)
            for (int g = 0; g < 2; ++g)
                for (int half = 0; half < 2; ++half)
                    add_words(sums + t * kRows + g * kRows / 2 + half * kRows / 4, sum[t][g][half]);
    }
};

// sum += what `table` holds for the nibbles; the first of a word begins the sum.
void look_up(__m256i table, __m256i nibbles, bool first, __m256i& sum) {
    const __m256i found = _mm256_shuffle_epi8(table, nibbles);
    sum = first ? found : _mm256_add_epi8(sum, found);
    in_register(sum);
}

// 64 rows x kTokens x at most kLookupWords: a lookup and an add do 128 halves of weights.
template <int kTokens>
void lookup_tile(const __m256i* nibbles, int n_words, const uint8_t* tables, ptrdiff_t stride, int32_t* sums) {
    LookupSums<kTokens> sum(n_words);
    for (int w = 0; w < n_words; ++w, nibbles += 2 * kNibbles, tables += kLookupBytes) {
        __m256i low[kTokens][2], high[kTokens][2];
        #pragma GCC unroll 8
        for (int i = 0; i < kNibbles; ++i)
            #pragma GCC unroll 8
            for (int t = 0; t < kTokens; ++t) {
                const uint8_t* table = tables + t * stride + i / 2 * 64 + i % 2 * 16;
                const __m256i low_table = twice(table), high_table = twice(table + 32);
                #pragma GCC unroll 8
                for (int g = 0; g < 2; ++g) {
                    look_up(low_table, nibbles[2 * i + g], i == 0, low[t][g]);
                    look_up(high_table, nibbles[2 * i + g], i == 0, high[t][g]);
                }
            }
        #pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
            #pragma GCC unroll 8
            for (int g = 0; g < 2; ++g) sum.add(t, g, low[t][g], high[t][g]);
    }
    sum.add_to_rows(sums);
}

// Words of a cache line, and lines of a panel's word.
constexpr int kLine = 16, kWordLines = kRows / kLine;

// How far ahead of their use the bits of one token are fetched, in words of a panel: 2 KiB. Measured: fetched 1 to 8 KiB
// ahead, bits that come from memory take 0.7 to 0.8 of the time.
constexpr int kLookupAhead = 8;

// So few tokens that nibbles are not stored: a word's sums of 64 rows, and what is looked up, fit the registers.
constexpr int kFewLookups = 3;

template <int kTokens>
void lookup_few(const uint32_t* panel, int n_words, const uint8_t* tables, ptrdiff_t stride, int32_t* sums) {
    LookupSums<kTokens> sum(n_words);
    for (int w = 0; w < n_words; ++w, panel += kRows) {
        for (int line = 0; line < kWordLines; ++line) __builtin_prefetch(panel + kLookupAhead * kRows + line * kLine);
        __m256i low[kTokens][2], high[kTokens][2];
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
                        look_up(low_table, nibbles[g], b + upper == 0, low[t][g]);
                        look_up(high_table, nibbles[g], b + upper == 0, high[t][g]);
                    }
                }
            }
        #pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t)
            #pragma GCC unroll 8
            for (int g = 0; g < 2; ++g) sum.add(t, g, low[t][g], high[t][g]);
    }
    sum.add_to_rows(sums);
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

void lookup_block(const uint32_t* const* panels, int n_panels, int n_words, const uint8_t* tables, ptrdiff_t stride,
                  int tokens, int32_t* const* sums) {
    if (tokens <= kFewLookups) {
        constexpr decltype(&lookup_few<1>) by_tokens[] = {nullptr, lookup_few<1>, lookup_few<2>, lookup_few<3>};
        for (int w = 0; w < n_words; w += kLookupWords) {
            const int width = n_words - w < kLookupWords ? n_words - w : kLookupWords;
            for (int p = 0; p < n_panels; ++p)
                by_tokens[tokens](panels[p] + w * kRows, width, tables + w * kLookupBytes, stride, sums[p]);
        }
        return;
    }
    constexpr int kTogether = 2;  // more tokens do not fit the registers
    __m256i nibbles[2][kBlockWords * kNibbles * 2];
    for (int p = 0; p < n_panels; ++p) store_nibbles(panels[p], n_words, nibbles[p]);
    // The bits of the next block, which lie behind these if they come from memory, are fetched a few with each tile.
    const int lines = n_words * kWordLines, per_tile = (lines * kTogether + tokens - 1) / tokens;
    for (int t = 0, line = 0; t < tokens; t += kTogether) {
        for (int i = 0; i < per_tile && line < lines; ++i, ++line)
            for (int p = 0; p < n_panels; ++p) __builtin_prefetch(panels[p] + n_words * kRows + line * kLine);
        const auto tile = tokens - t < kTogether ? lookup_tile<1> : lookup_tile<kTogether>;
        for (int w = 0; w < n_words; w += kLookupWords) {
            const int width = n_words - w < kLookupWords ? n_words - w : kLookupWords;
            const uint8_t* from = tables + t * stride + w * kLookupBytes;
            for (int p = 0; p < n_panels; ++p)
                tile(nibbles[p] + w * kNibbles * 2, width, from, stride, sums[p] + t * kRows);
        }
    }
}
