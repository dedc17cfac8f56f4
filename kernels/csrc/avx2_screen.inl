// The screen of a head with AVX2: the part of avx2.cpp that multiplies its codes, included there inside its unnamed
// namespace.

// The sums of a block's codes times x [128]: two codes times x fit 16 bits twice.
__m256i block_dot(const uint8_t* codes, const int8_t* x) {
    const __m256i low = _mm256_set1_epi8(63);
    const __m256i a = load(codes), b = load(codes + 32), c = load(codes + 64);
    const __m256i last =
        _mm256_or_si256(_mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(a, 6), _mm256_set1_epi8(3)),
                                        _mm256_and_si256(_mm256_srli_epi16(b, 4), _mm256_set1_epi8(12))),
                        _mm256_and_si256(_mm256_srli_epi16(c, 2), _mm256_set1_epi8(48)));
    const __m256i first_two = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(a, low), load(x)),
                                               _mm256_maddubs_epi16(_mm256_and_si256(b, low), load(x + 32)));
    const __m256i last_two = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(c, low), load(x + 64)),
                                              _mm256_maddubs_epi16(last, load(x + 96)));
    return _mm256_add_epi32(widen(first_two), widen(last_two));
}

// How far ahead of its use a code is fetched, in bytes.
constexpr int64_t kCodesAhead = 768;

template <int kTogether>
void screen_together(const uint8_t* codes, int64_t apart, int64_t blocks, int64_t n_rows, const int8_t* x,
                     int32_t* sums) {
    const int64_t row = blocks * kCodeBytes;
    for (int64_t r = 0; r < n_rows; ++r, codes += row) {
        __m256i sum[kTogether] = {};
        for (int64_t block = 0; block < blocks; ++block)
#pragma GCC unroll 4
            for (int s = 0; s < kTogether; ++s) {
                const uint8_t* here = codes + s * apart * row + block * kCodeBytes;
                __builtin_prefetch(here + kCodesAhead);
                __builtin_prefetch(here + kCodesAhead + kCodeBytes / 2);
                sum[s] = _mm256_add_epi32(sum[s], block_dot(here, x + block * kCodeColumns));
            }
        for (int s = 0; s < kTogether; ++s) sums[s * n_rows + r] = sum_lanes(sum[s]);
    }
}

void screen_dots(const uint8_t* codes, int64_t apart, int64_t blocks, int64_t n_rows, const int8_t* x, int32_t* sums) {
    (apart ? screen_together<kStreams> : screen_together<1>)(codes, apart, blocks, n_rows, x, sums);
}
