// The kernels in plain C++, for any CPU. The loops over the rows of a panel are what the compiler vectorizes, with
// whatever the baseline of the machine has (SSE2 on x86-64, NEON on aarch64).
#include <cstring>

#include "activations.h"
#include "kernels.h"

namespace fbitrain {
namespace {

#include "activations.inl"
#include "pack.inl"
#include "salient.inl"

constexpr int kLanes = 16;  // rows summed at a time: few enough to stay in registers

void transpose(const uint32_t* words, ptrdiff_t stride, int n_words, uint32_t* panel) {
    for (int r = 0; r < kRows; ++r)
        for (int w = 0; w < n_words; ++w) panel[w * kRows + r] = words[r * stride + w];
}

void int8_block(const uint32_t* panel, int n_words, const int8_t* x, ptrdiff_t stride, int tokens, int32_t* sums) {
    for (int t = 0; t < tokens; ++t, x += stride, sums += kRows)
        for (int r0 = 0; r0 < kRows; r0 += kLanes) {
            uint32_t total[kLanes] = {};  // unsigned: adding a negative x wraps, as it should
            for (int w = 0; w < n_words; ++w)
                for (int p = 0; p < kWordBits; ++p) {
                    const uint32_t value = static_cast<uint32_t>(int32_t{x[w * kWordBits + p]});
                    const int column = 8 * (p % 4) + p / 4;
                    for (int r = 0; r < kLanes; ++r)
                        total[r] += value & (0u - ((panel[w * kRows + r0 + r] >> column) & 1u));
                }
            for (int r = 0; r < kLanes; ++r) sums[r0 + r] += static_cast<int32_t>(total[r]);
        }
}

void float_tables(const float* z, int n_words, float* tables) { std::memcpy(tables, z, sizeof(float) * 32 * n_words); }

void float_block(const uint32_t* panel, int n_words, const float* tables, ptrdiff_t stride, int tokens, float* sums) {
    for (int t = 0; t < tokens; ++t, tables += stride, sums += kRows)
        for (int r0 = 0; r0 < kRows; r0 += kLanes) {
            float total[kLanes] = {};
            for (int w = 0; w < n_words; ++w)
                for (int k = 0; k < kWordBits; ++k) {
                    uint32_t pattern, flipped[kLanes];
                    std::memcpy(&pattern, &tables[w * kWordBits + k], sizeof pattern);
                    for (int r = 0; r < kLanes; ++r)  // a clear bit flips the sign
                        flipped[r] = pattern ^ ((~(panel[w * kRows + r0 + r] >> k)) << 31);
                    float terms[kLanes];
                    std::memcpy(terms, flipped, sizeof terms);
                    for (int r = 0; r < kLanes; ++r) total[r] += terms[r];
                }
            for (int r = 0; r < kLanes; ++r) sums[r0 + r] += total[r];
        }
}

uint32_t popcount(uint32_t x) {  // Hacker's Delight, figure 5-2
    x -= (x >> 1) & 0x55555555u;
    x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
    x = (x + (x >> 4)) & 0x0F0F0F0Fu;
    x += x >> 8;
    return (x + (x >> 16)) & 0x3Fu;
}

void xnor_block(const uint32_t* panel, int n_words, const uint32_t* a, const uint8_t*, ptrdiff_t stride, int tokens,
                int32_t* sums) {
    for (int t = 0; t < tokens; ++t, a += stride, sums += kRows)
        for (int w = 0; w < n_words; ++w)
            for (int r = 0; r < kRows; ++r) sums[r] += static_cast<int32_t>(popcount(a[w] ^ panel[w * kRows + r]));
}

int32_t screen_dot(const uint8_t* codes, int64_t blocks, const int8_t* x) {
    int32_t sum = 0;
    for (int64_t block = 0; block < blocks; ++block, codes += kCodeBytes, x += kCodeColumns)
        for (int j = 0; j < 32; ++j) {
            const int a = codes[j], b = codes[32 + j], c = codes[64 + j], last = a >> 6 | (b >> 6) << 2 | (c >> 6) << 4;
            sum += (a & 63) * x[j] + (b & 63) * x[32 + j] + (c & 63) * x[64 + j] + last * x[96 + j];
        }
    return sum;
}

void screen_dots(const uint8_t* codes, int64_t apart, int64_t blocks, int64_t n_rows, const int8_t* x, int32_t* sums) {
    for (int64_t s = 0; s < (apart ? kStreams : 1); ++s)
        for (int64_t r = 0; r < n_rows; ++r)
            sums[s * n_rows + r] = screen_dot(codes + (s * apart + r) * blocks * kCodeBytes, blocks, x);
}

}  // namespace

const KernelSet kPortable = {
    .name = "portable",
    .transpose = transpose,
    .int8_block = int8_block,
    .floats_per_word = kWordBits,
    .float_tables = float_tables,
    .float_block = float_block,
    .xnor_block = xnor_block,
    .salient_decode = salient_decode,
    .salient_sums = salient_sums,
    .pack_row = pack_row,
    .unpack_row = unpack_row,
    .activations = kActivations,
    .screen_dots = screen_dots,
};

}  // namespace fbitrain
