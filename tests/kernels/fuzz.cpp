// Calls the C functions with random shapes and with wrong arguments, every array allocated to the byte, so that
// AddressSanitizer and UBSan see whatever the kernels do outside of them. Results of the levels are compared with each
// other. Usage: fuzz SEED ROUNDS LEVEL...
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"

extern "C" {
int64_t fbitrain_binary_linear(int, int, int, int, int, const void*, const void*, const void*, const float*,
                               const float*, void*, int64_t, int64_t, int64_t, int64_t) noexcept;
int64_t fbitrain_interleaved_bytes(int, int64_t, int64_t) noexcept;
int64_t fbitrain_interleave(int, int, const void*, void*, int64_t, int64_t) noexcept;
int64_t fbitrain_mixture_linear(int, int, int, int, const void*, const void*, const float*, const float*, const float*,
                                void*, int64_t, int64_t, int64_t, int64_t) noexcept;
int64_t fbitrain_partial_linear(int, int, int, int, int, const void*, const void*, const float*, const int32_t*,
                                const void*, const void*, const float*, void*, int64_t, int64_t, int64_t, int64_t,
                                int64_t) noexcept;
int64_t fbitrain_xnor_gemm(int, int, const void*, const void*, void*, int64_t, int64_t, int64_t) noexcept;
int64_t fbitrain_pack_signs(int, int, int, const void*, void*, int64_t, int64_t) noexcept;
int64_t fbitrain_transpose_signs(int, const void*, void*, int64_t, int64_t) noexcept;
int64_t fbitrain_unpack_signs(int, int, int, const void*, void*, int64_t, int64_t) noexcept;
}

namespace {

using fbitrain::kBadArgument;
using fbitrain::kBadEntries;
using fbitrain::kNoLevel;
using fbitrain::kOk;

std::mt19937_64 generator;
std::vector<int> levels;

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "fuzz: %s\n", what);
    std::exit(1);
}

int64_t pick(int64_t low, int64_t high) { return low + static_cast<int64_t>(generator() % (high - low + 1)); }

// Mostly small, now and then around the sizes of panels, blocks and slabs.
int64_t pick_size() {
    static const int64_t special[] = {1, 31, 32, 33, 60, 61, 63, 64, 65, 255, 256, 257, 480, 511, 512, 513, 1025};
    return pick(0, 3) ? pick(1, 40) : special[pick(0, 16)];
}

template <typename T>
std::unique_ptr<T[]> filled(int64_t count) {
    std::unique_ptr<T[]> array(new T[count]);
    for (int64_t i = 0; i < count; ++i) array[i] = static_cast<T>(generator());
    return array;
}

std::unique_ptr<float[]> floats(int64_t count) {
    std::unique_ptr<float[]> array(new float[count]);
    for (int64_t i = 0; i < count; ++i) array[i] = static_cast<float>(pick(-1000, 1000)) / 256.0f;
    return array;
}

using Aligned = std::unique_ptr<void, void (*)(void*)>;

// For half of the calls the bits in the level's own order, to the byte; null for the others, and if it has none.
Aligned interleaved(int level, const uint32_t* words, int64_t n, int64_t k) {
    const int64_t bytes = fbitrain_interleaved_bytes(level, n, k);
    check(bytes >= 0, "interleaved_bytes refused valid arguments");
    if (bytes == 0 || pick(0, 1)) return {nullptr, std::free};
    Aligned out(std::aligned_alloc(64, static_cast<size_t>(bytes)), std::free);
    check(fbitrain_interleave(level, static_cast<int>(pick(1, 3)), words, out.get(), n, k) == kOk,
          "interleave refused valid arguments");
    return out;
}

// Random bits, those past k clear.
std::unique_ptr<uint32_t[]> packed(int64_t rows, int64_t k) {
    const int64_t n_words = (k + 31) / 32;
    auto words = filled<uint32_t>(rows * n_words);
    if (k % 32)
        for (int64_t row = 0; row < rows; ++row) words[row * n_words + n_words - 1] &= (1u << (k % 32)) - 1;
    return words;
}

void linear() {
    const int64_t m = pick_size(), n = pick_size(), scale = pick(0, 3), mode = pick(0, 1);
    const int64_t group = 32 * pick(1, 20), k = scale == 3 ? group * pick(1, 3) : pick_size();
    const int64_t n_scales[] = {k, n, 1, n * (k / group)};
    const bool bfloat16 = pick(0, 1);
    const auto words = packed(n, k);
    const auto alpha = floats(n_scales[scale]), beta = floats(n_scales[scale]), x = floats(m * k);
    std::unique_ptr<uint16_t[]> narrow(new uint16_t[m * k]);
    for (int64_t i = 0; i < m * k; ++i) narrow[i] = static_cast<uint16_t>(0x3F80 + pick(-200, 200));
    const void* input = bfloat16 ? static_cast<const void*>(narrow.get()) : x.get();
    const float* shift = scale == 3 || pick(0, 1) ? nullptr : beta.get();
    std::vector<float> first;
    for (int level : levels) {
        std::unique_ptr<float[]> y(new float[m * n]);
        std::unique_ptr<uint16_t[]> narrow_y(new uint16_t[m * n]);
        void* output = bfloat16 ? static_cast<void*>(narrow_y.get()) : y.get();
        const auto in_order = interleaved(level, words.get(), n, k);
        check(fbitrain_binary_linear(level, static_cast<int>(pick(1, 3)), static_cast<int>(mode), bfloat16,
                                     static_cast<int>(scale), input, words.get(), in_order.get(), alpha.get(), shift,
                                     output, m, n, k, group) == kOk,
              "binary_linear refused valid arguments");
        if (bfloat16) continue;
        if (first.empty()) first.assign(y.get(), y.get() + m * n);
        for (int64_t i = 0; i < m * n; ++i)
            check(std::fabs(first[i] - y[i]) <= 1e-3f * (1.0f + static_cast<float>(k)), "levels disagree");
    }
}

// y of every level, of which each must be near the first.
template <typename Call>
void compare_levels(int64_t size, double tolerance, const char* what, const Call& call) {
    std::vector<float> first;
    for (int level : levels) {
        std::unique_ptr<float[]> y(new float[size]);
        check(call(level, static_cast<int>(pick(1, 3)), y.get()) == kOk, what);
        if (first.empty()) first.assign(y.get(), y.get() + size);
        for (int64_t i = 0; i < size; ++i) check(std::fabs(first[i] - y[i]) <= tolerance, what);
    }
}

void mixture() {
    const int64_t m = pick(1, 70), n = pick(1, 70), k = pick_size(), experts = pick(1, 6);
    const int mode = static_cast<int>(pick(0, 1));
    const auto words = packed(n, k);
    const auto x = floats(m * k), gates = floats(m * experts), in = floats(experts * k), out = floats(experts * n);
    compare_levels(m * n, 1e-1 * static_cast<double>(k + 100), "mixture_linear", [&](int level, int threads, float* y) {
        return fbitrain_mixture_linear(level, threads, mode, 0, x.get(), words.get(), gates.get(), in.get(), out.get(),
                                       y, m, n, k, experts);
    });
}

void partial() {
    const int64_t m = pick(1, 70), n = pick(1, 70), scale = pick(0, 1) ? 3 : 1, group = 32 * pick(1, 20);
    const int64_t k = scale == 3 ? group * pick(1, 3) : pick_size(), one_in = pick(0, 1) ? 1 : pick(2, 50);
    const int mode = static_cast<int>(pick(0, 1));
    const bool half = pick(0, 1);
    const auto words = packed(n, k);
    const auto x = floats(m * k), alpha = floats(scale == 3 ? n * (k / group) : n), value_scale = floats(n);
    std::vector<uint16_t> chosen;
    std::unique_ptr<int32_t[]> row_starts(new int32_t[n + 1]());
    for (int64_t row = 0; row < n; ++row) {
        for (int64_t column = 0; column < k; ++column)
            if (pick(1, one_in) == 1) chosen.push_back(static_cast<uint16_t>(column));
        row_starts[row + 1] = static_cast<int32_t>(chosen.size());
    }
    const auto entries = static_cast<int64_t>(chosen.size());
    std::unique_ptr<uint16_t[]> columns(new uint16_t[entries]), halves(new uint16_t[entries]);
    std::copy(chosen.begin(), chosen.end(), columns.get());
    for (int64_t i = 0; i < entries; ++i) halves[i] = static_cast<uint16_t>(0x3C00 + pick(-200, 200));
    const auto bytes = filled<int8_t>(entries);
    const auto call = [&](int level, int threads, float* y) {
        return fbitrain_partial_linear(level, threads, mode, 0, static_cast<int>(scale), x.get(), words.get(),
                                       alpha.get(), row_starts.get(), columns.get(),
                                       half ? static_cast<const void*>(halves.get()) : bytes.get(),
                                       half ? nullptr : value_scale.get(), y, m, n, k, group, entries);
    };
    compare_levels(m * n, 1e-2 * static_cast<double>(k + 100), "partial_linear", call);
    if (!entries) return;
    std::unique_ptr<float[]> y(new float[m * n]);
    columns[pick(0, entries - 1)] = static_cast<uint16_t>(k);  // outside of its row
    for (int level : levels) check(call(level, 2, y.get()) == kBadEntries, "a column outside of its row");
}

void linear_of_nan() {
    const int64_t m = pick(1, 8), k = pick_size(), n = 3, bad = pick(0, m * k - 1);
    const auto x = floats(m * k), alpha = floats(1);
    x[bad] = pick(0, 1) ? NAN : INFINITY;
    const auto words = packed(n, k);
    for (int level : levels) {
        std::unique_ptr<float[]> y(new float[m * n]);
        check(fbitrain_binary_linear(level, 1, 1, 0, 2, x.get(), words.get(), nullptr, alpha.get(), nullptr, y.get(), m, n,
                                     k, 0) == 1 + bad / k,
              "int8 mode did not name the token that is not finite");
    }
}

void product() {
    const int64_t m = pick_size(), n = pick_size(), k = pick_size(), n_words = (k + 31) / 32;
    const auto a = packed(m, k), b = packed(n, k);
    for (int level : levels) {
        std::unique_ptr<int32_t[]> out(new int32_t[m * n]);
        check(fbitrain_xnor_gemm(level, static_cast<int>(pick(1, 3)), a.get(), b.get(), out.get(), m, n, k) == kOk,
              "xnor_gemm refused valid arguments");
        for (int64_t i = 0; i < m * n; ++i) {
            int64_t differing = 0;
            for (int64_t w = 0; w < n_words; ++w)
                differing += __builtin_popcount(a[i / n * n_words + w] ^ b[i % n * n_words + w]);
            check(out[i] == k - 2 * differing, "xnor_gemm is wrong");
        }
    }
}

void packing() {
    const int64_t rows = pick_size(), k = pick_size(), n_words = (k + 31) / 32;
    static const int64_t bytes[] = {4, 2, 2, 8};
    for (int level : levels)
        for (int format = 0; format < 4; ++format) {
            const auto words = packed(rows, k);
            std::unique_ptr<uint64_t[]> signs(new uint64_t[(rows * k * bytes[format] + 7) / 8]);
            std::unique_ptr<uint32_t[]> again(new uint32_t[rows * n_words]);
            const int threads = static_cast<int>(pick(1, 3));
            check(fbitrain_unpack_signs(level, threads, format, words.get(), signs.get(), rows, k) == kOk, "unpack_signs");
            check(fbitrain_pack_signs(level, threads, format, signs.get(), again.get(), rows, k) == kOk, "pack_signs");
            for (int64_t i = 0; i < rows * n_words; ++i) check(words[i] == again[i], "packing does not undo unpacking");
        }
}

void transposing() {
    const int64_t n = pick_size(), k = pick_size(), n_words = n * ((k + 31) / 32);
    const auto words = packed(n, k);
    std::unique_ptr<uint32_t[]> once(new uint32_t[k * ((n + 31) / 32)]), twice(new uint32_t[n_words]);
    check(fbitrain_transpose_signs(static_cast<int>(pick(1, 3)), words.get(), once.get(), n, k) == kOk, "transpose");
    check(fbitrain_transpose_signs(1, once.get(), twice.get(), k, n) == kOk, "transpose back");
    for (int64_t i = 0; i < n_words; ++i) check(words[i] == twice[i], "transposing twice is not the same again");
    check(fbitrain_transpose_signs(1, nullptr, twice.get(), 1, 1) == kBadArgument, "no words");
}

// The longest row, and the largest sums that it can have. AVX-512, since it does one row in no more time than it must.
void longest_row() {
    const int64_t k = fbitrain::kMaxColumns;
    const std::vector<uint32_t> words(k / 32, ~0u);
    const std::vector<float> x(k, 127.0f);
    const float alpha = 1.0f;
    float y = 0.0f;
    check(fbitrain_binary_linear(2, 1, 1, 0, 2, x.data(), words.data(), nullptr, &alpha, nullptr, &y, 1, 1, k, 0) == kOk, "k");
    check(y == 127.0f * static_cast<float>(k), "the sum of the longest row");
}

// Pointers that would crash if anything followed them.
void wrong_arguments() {
    float* const wild = reinterpret_cast<float*>(uintptr_t{64});
    const auto linear_status = [=](int level, int threads, int mode, int scale, const void* x, const float* beta,
                                   int64_t m, int64_t n, int64_t k, int64_t group) {
        return fbitrain_binary_linear(level, threads, mode, 0, scale, x, wild, nullptr, wild, beta, wild, m, n, k, group);
    };
    check(linear_status(-1, 1, 0, 0, wild, nullptr, 1, 1, 1, 0) == kNoLevel, "level -1");
    check(linear_status(99, 1, 0, 0, wild, nullptr, 1, 1, 1, 0) == kNoLevel, "level 99");
    check(linear_status(0, 0, 0, 0, wild, nullptr, 1, 1, 1, 0) == kBadArgument, "no threads");
    check(linear_status(0, 1, 2, 0, wild, nullptr, 1, 1, 1, 0) == kBadArgument, "mode 2");
    check(linear_status(0, 1, 0, 4, wild, nullptr, 1, 1, 1, 0) == kBadArgument, "scale 4");
    check(linear_status(0, 1, 0, 0, nullptr, nullptr, 1, 1, 1, 0) == kBadArgument, "no x");
    for (int64_t size : {int64_t{-1}, INT64_MIN, INT64_MAX, fbitrain::kMaxColumns + 1})
        check(linear_status(0, 1, 0, 0, wild, nullptr, 1, 1, size, 0) == kBadArgument, "columns");
    check(linear_status(0, 1, 0, 0, wild, nullptr, -1, 1, 1, 0) == kBadArgument, "tokens");
    check(linear_status(0, 1, 0, 0, wild, nullptr, 1, -1, 1, 0) == kBadArgument, "rows");
    for (int64_t group : {-32, 0, 16, 48, 96}) check(linear_status(0, 1, 0, 3, wild, nullptr, 1, 1, 64, group) < 0, "group");
    check(linear_status(0, 1, 0, 3, wild, wild, 1, 1, 64, 32) == kBadArgument, "a shift of groups");
    check(linear_status(0, 1, 0, 0, wild, nullptr, 0, 1, 1, 0) == kOk, "no tokens is no error");
    check(fbitrain_mixture_linear(0, 1, 0, 0, wild, wild, wild, wild, wild, wild, 1, 1, 1, 0) == kBadArgument, "experts");
    check(fbitrain_mixture_linear(0, 1, 0, 0, wild, wild, nullptr, wild, wild, wild, 1, 1, 1, 1) == kBadArgument, "gates");
    const int32_t row_starts[] = {0, 2, 1};
    const auto partial_status = [=](int scale, const int32_t* starts, const void* columns, int64_t entries) {
        return fbitrain_partial_linear(0, 1, 0, 0, scale, wild, wild, wild, starts, columns, wild, wild, wild, 1, 2, 32,
                                       32, entries);
    };
    check(partial_status(0, row_starts, wild, 1) == kBadArgument, "a column scale with salient weights");
    check(partial_status(1, nullptr, wild, 1) == kBadArgument, "no row_starts");
    check(partial_status(1, row_starts, nullptr, 1) == kBadArgument, "no columns");
    check(partial_status(1, row_starts, wild, -1) == kBadArgument, "entries");
    check(partial_status(1, row_starts, wild, 1) == kBadEntries, "row_starts that descend");
    check(fbitrain_xnor_gemm(0, 1, nullptr, wild, wild, 1, 1, 1) == kBadArgument, "no a");
    check(fbitrain_xnor_gemm(0, 1, wild, wild, wild, 1, 1, -1) == kBadArgument, "columns of xnor_gemm");
    check(fbitrain_pack_signs(0, 1, 4, wild, wild, 1, 1) == kBadArgument, "format 4");
    check(fbitrain_unpack_signs(0, 1, -1, wild, wild, 1, 1) == kBadArgument, "format -1");
    check(fbitrain_pack_signs(0, 1, 0, nullptr, wild, 1, 1) == kBadArgument, "no w");
}

}  // namespace

int main(int argc, char** argv) {
    check(argc > 3, "usage: fuzz SEED ROUNDS LEVEL...");
    generator.seed(std::strtoull(argv[1], nullptr, 10));
    for (int i = 3; i < argc; ++i) levels.push_back(std::atoi(argv[i]));
    wrong_arguments();
    longest_row();
    for (int round = std::atoi(argv[2]); round > 0; --round) {
        linear();
        mixture();
        partial();
        linear_of_nan();
        product();
        packing();
        transposing();
    }
    std::puts("ok");
}
