// xnor with AVX2: the part of avx2.cpp about popcounts, included there inside its unnamed namespace.

constexpr int kNibbles = kWordBits / 4;  // per word

// One token: the popcount of each byte, by a lookup per nibble. At most 16 words x 8 in a byte.
void xnor_one_token(const uint32_t* panel, int n_words, const uint32_t* a, int32_t* sums) {
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi8(1);
    const __m256i counts = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                            0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
    for (int g = 0; g < kGroups; ++g) {
        __m256i sum = _mm256_setzero_si256();
        for (int w = 0; w < n_words; ++w) {
            const __m256i differing =
                _mm256_xor_si256(load(panel + w * kRows + g * kLanes), _mm256_set1_epi32(static_cast<int>(a[w])));
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(differing, 4), low);
            sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(counts, _mm256_and_si256(differing, low)));
            sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(counts, high));
        }
        add_to(sums + g * kLanes, widen(_mm256_maddubs_epi16(sum, ones)));
    }
}

// The four bytes of a word of 32 rows: per byte a register, one byte per row, in the order that `add_bytes` knows.
void split_bytes(const uint32_t* word, __m256i* bytes) {
    const __m256i by_column =  // four rows of four bytes -> four columns of four bytes
        _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                         0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    __m256i v[4];
    #pragma GCC unroll 8
    for (int g = 0; g < 4; ++g) v[g] = _mm256_shuffle_epi8(load(word + g * kLanes), by_column);
    const __m256i ab = _mm256_unpacklo_epi32(v[0], v[1]), AB = _mm256_unpackhi_epi32(v[0], v[1]);
    const __m256i cd = _mm256_unpacklo_epi32(v[2], v[3]), CD = _mm256_unpackhi_epi32(v[2], v[3]);
    bytes[0] = _mm256_unpacklo_epi64(ab, cd);
    bytes[1] = _mm256_unpackhi_epi64(ab, cd);
    bytes[2] = _mm256_unpacklo_epi64(AB, CD);
    bytes[3] = _mm256_unpackhi_epi64(AB, CD);
}

__m256i low_nibbles(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }

// The shift is a multiplication: it leaves the ports of Zen 3 that shift to the lookups, which need the same two.
__m256i high_nibbles(__m256i bytes) { return low_nibbles(_mm256_mulhi_epu16(bytes, _mm256_set1_epi16(1 << 12))); }

// Per nibble of 32 rows a register. `stride` is the distance between registers.
void split_nibbles(const uint32_t* panel, int n_words, __m256i* nibbles, int stride) {
    for (int w = 0; w < n_words; ++w) {
        __m256i bytes[4];
        split_bytes(panel + w * kRows, bytes);
        #pragma GCC unroll 8
        for (int b = 0; b < 4; ++b, nibbles += 2 * stride) {
            nibbles[0] = low_nibbles(bytes[b]);
            nibbles[stride] = high_nibbles(bytes[b]);
        }
    }
}

// Adds the bytes of such a register to the sums of their 32 rows. Of the four bytes of 32-bit lane g, in the lower and
// in the upper half, come the 4 + 4 sums of rows 8 * g to 8 * g + 7.
void add_bytes(int32_t* sums, __m256i bytes) {
    #pragma GCC unroll 8
    for (int g = 0; g < 4; ++g) {
        const __m256i one_group =
            _mm256_shuffle_epi8(bytes, _mm256_set1_epi32(0x03020100 + 0x04040404 * g));  // lane g, four times over
        const __m256i separate =
            _mm256_and_si256(one_group, _mm256_setr_epi32(0xFF, 0xFF00, 0xFF0000, static_cast<int>(0xFF000000u), 0xFF,
                                                          0xFF00, 0xFF0000, static_cast<int>(0xFF000000u)));
        add_to(sums + g * kLanes, _mm256_srlv_epi32(separate, _mm256_setr_epi32(0, 8, 16, 24, 0, 8, 16, 24)));
    }
}

// popcount(q ^ i) for every nibble i, one row of 16 bytes for each nibble q of a.
struct XnorTables {
    alignas(16) uint8_t rows[16][16];
    constexpr XnorTables() : rows() {
        for (int q = 0; q < 16; ++q)
            for (int i = 0; i < 16; ++i)
                for (int bit = 0; bit < 4; ++bit) rows[q][i] += ((q ^ i) >> bit) & 1;
    }
};
constexpr XnorTables kXnorTables;

// 64 rows x kTokens: a lookup and an add do 128 bits. A byte takes at most n_nibbles <= 63 terms of at most 4.
template <int kTokens>
void xnor_tile(const __m256i* nibbles, int n_nibbles, const uint8_t* a, ptrdiff_t stride, int32_t* sums) {
    __m256i sum[kTokens][2] = {};
    for (int i = 0; i < n_nibbles; ++i)
        #pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
            const __m256i table = _mm256_broadcastsi128_si256(
                _mm_load_si128(reinterpret_cast<const __m128i*>(&kXnorTables.rows[0][0] + a[t * stride + i])));
            #pragma GCC unroll 8
            for (int g = 0; g < 2; ++g) {
                sum[t][g] = _mm256_add_epi8(sum[t][g], _mm256_shuffle_epi8(table, nibbles[2 * i + g]));
                in_register(sum[t][g]);
            }
        }
    #pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
        #pragma GCC unroll 8
        for (int g = 0; g < 2; ++g) add_bytes(sums + t * kRows + g * kRows / 2, sum[t][g]);
}

void xnor_block(const uint32_t* panel, int n_words, const uint32_t* a, const uint8_t* a_nibbles, ptrdiff_t stride,
                int tokens, int32_t* sums) {
    if (tokens < 3) {
        for (int t = 0; t < tokens; ++t) xnor_one_token(panel, n_words, a + t * stride, sums + t * kRows);
        return;
    }
    constexpr int kMostNibbles = 60;
    __m256i nibbles[kBlockWords * kNibbles * 2];
    split_nibbles(panel, n_words, nibbles, 2);
    split_nibbles(panel + kRows / 2, n_words, nibbles + 1, 2);
    constexpr decltype(&xnor_tile<1>) tiles[] = {nullptr,      xnor_tile<1>, xnor_tile<2>, xnor_tile<3>,
                                                 xnor_tile<4>, xnor_tile<5>, xnor_tile<6>};
    for (int t = 0; t < tokens; t += kTileTokens) {
        const int n = tokens - t < kTileTokens ? tokens - t : kTileTokens;
        for (int i = 0; i < kNibbles * n_words; i += kMostNibbles) {
            const int rest = kNibbles * n_words - i;
            tiles[n](nibbles + 2 * i, rest < kMostNibbles ? rest : kMostNibbles, a_nibbles + t * kNibbles * stride + i,
                     kNibbles * stride, sums + t * kRows);
        }
    }
}
