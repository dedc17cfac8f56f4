// int8 products of many tokens on AMX tiles; for few tokens, and for all else, the level below serves.
//
// A tile multiplication takes A, 16 tokens x 64 columns of int8, and B, for 16 rows of the weight the same 64 columns
// in 16 lines of 4: which is just the order that (panel >> j) & 0x01010101 yields and that x is stored in. A is read
// where it lies; B is written out once per block, and serves all its tokens.
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

namespace fbitrain {
namespace {

constexpr int kLanes = 16;
constexpr int kGroups = kRows / kLanes;
constexpr int kTileTokens = 16;
constexpr int kFewTokens = 8;  // a tile of fewer costs as much as one of 16
constexpr int kTileBytes = 1024;
constexpr int kTileWords = 2;  // columns of a tile: 64

// Tiles 0 to 3 are sums, one per 16 rows of the panel; 4 is A; 5 is B.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};

    explicit TileConfig(int tokens) {
        for (int tile = 0; tile < 5; ++tile) rows[tile] = static_cast<uint8_t>(tokens);
        rows[5] = 16;
    }
};

// B of 16 rows: [n_words rounded up to whole tiles][8][16 rows][4]. A last half tile is zeros, which meet whatever
// follows x.
void expand(const uint32_t* panel, int n_words, uint8_t* bytes) {
    const __m512i ones = _mm512_set1_epi8(1);
    for (int w = 0; w < n_words; ++w)
        for (int j = 0; j < 8; ++j) {
            const __m512i bits = _mm512_srl_epi32(_mm512_load_si512(panel + w * kRows), _mm_cvtsi32_si128(j));
            _mm512_store_si512(bytes + (8 * w + j) * 64, _mm512_and_si512(bits, ones));
        }
    if (n_words % kTileWords) std::memset(bytes + n_words * kTileBytes / 2, 0, kTileBytes / 2);
}

// Up to 16 tokens, configured before. Tile numbers must be literals.
void multiply(const uint8_t* bytes, int n_tiles, const int8_t* x, ptrdiff_t stride, int32_t* sums) {
    constexpr int kLine = kRows * sizeof(int32_t);
    const ptrdiff_t next_rows = static_cast<ptrdiff_t>(n_tiles) * kTileBytes;
    _tile_loadd(0, sums, kLine);
    _tile_loadd(1, sums + kLanes, kLine);
    _tile_loadd(2, sums + 2 * kLanes, kLine);
    _tile_loadd(3, sums + 3 * kLanes, kLine);
    for (int i = 0; i < n_tiles; ++i, bytes += kTileBytes) {
        _tile_loadd(4, x + i * 64, stride);
        _tile_loadd(5, bytes, 64);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(5, bytes + next_rows, 64);
        _tile_dpbsud(1, 4, 5);
        _tile_loadd(5, bytes + 2 * next_rows, 64);
        _tile_dpbsud(2, 4, 5);
        _tile_loadd(5, bytes + 3 * next_rows, 64);
        _tile_dpbsud(3, 4, 5);
    }
    _tile_stored(0, sums, kLine);
    _tile_stored(1, sums + kLanes, kLine);
    _tile_stored(2, sums + 2 * kLanes, kLine);
    _tile_stored(3, sums + 3 * kLanes, kLine);
}

void int8_block(const uint32_t* panel, int n_words, const int8_t* x, ptrdiff_t stride, int tokens, int32_t* sums) {
    if (tokens < kFewTokens) return kAvx512.int8_block(panel, n_words, x, stride, tokens, sums);
    alignas(64) uint8_t bytes[kGroups * kBlockWords / kTileWords * kTileBytes];
    const int n_tiles = (n_words + kTileWords - 1) / kTileWords;
    for (int g = 0; g < kGroups; ++g) expand(panel + g * kLanes, n_words, bytes + g * n_tiles * kTileBytes);
    for (int t = 0, configured = 0; t < tokens; t += kTileTokens) {
        const int n = tokens - t < kTileTokens ? tokens - t : kTileTokens;
        if (n != configured) {
            const TileConfig config(n);
            _tile_loadconfig(&config);
            configured = n;
        }
        multiply(bytes, n_tiles, x + t * stride, stride, sums + t * kRows);
    }
    _tile_release();  // so that thread switches need not save 8 KiB of tiles
}

}  // namespace

const KernelSet kAmx = {
    .name = "amx",
    .int8_block = int8_block,
};

}  // namespace fbitrain
