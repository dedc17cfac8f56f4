// From x to what the block functions take: scaled, quantized and ordered, or turned into tables.
#include "tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "activations.h"

namespace fbitrain {
namespace {

void read_token(const Linear& p, int64_t token, float* z) {
    if (p.bfloat16) {
        const auto* x = static_cast<const uint16_t*>(p.x) + token * p.k;
        for (int64_t i = 0; i < p.k; ++i) z[i] = from_bfloat16(x[i]);
    } else {
        std::memcpy(z, static_cast<const float*>(p.x) + token * p.k, sizeof(float) * p.k);
    }
    std::fill(z + p.k, z + p.padded(), 0.0f);
}

float shift_of(const Linear& p, const float* x) {
    if (!p.beta) return 0.0f;
    if (p.scale != kColumn) return sum_of(p.k, [&](int64_t i) { return x[i]; });
    return sum_of(p.k, [&](int64_t i) { return x[i] * p.parameter(p.beta, i); });
}

// Sums of the quantized values, whose order within a word does not matter: groups are whole words.
void total_groups(const Linear& p, const int8_t* q, int32_t* totals) {
    const int64_t size = p.scale == kGroup ? p.group_size : p.padded();
    for (int64_t g = 0; g < p.groups(); ++g, q += size) {
        int32_t total = 0;
        for (int64_t i = 0; i < size; ++i) total += q[i];
        totals[g] = total;
    }
}

// From the order of int8_block to that of int8_rows; the four columns of an i stay together.
void order_by_rows(const Linear& p, int8_t* q, float* scratch) {
    const int64_t chunk = p.set.chunk_words, n_words = p.token_stride() / kWordBits;
    std::memset(q + p.padded(), 0, static_cast<size_t>(p.token_stride() - p.padded()));
    auto* from = reinterpret_cast<char*>(scratch);
    std::memcpy(from, q, static_cast<size_t>(p.token_stride()));
    for (int64_t w = 0; w < n_words; ++w)
        for (int64_t j = 0; j < 8; ++j)
            std::memcpy(q + (w / chunk * chunk * 8 + j * chunk + w % chunk) * 4, from + (w * 8 + j) * 4, 4);
}

void scale_columns(const Linear& p, int64_t token, float* z) {
    if (p.scale == kColumn)
        for (int64_t i = 0; i < p.k; ++i) z[i] *= p.parameter(p.alpha, i);
    if (!p.mixture) return;
    constexpr int kColumns = 256;
    float factor[kColumns];
    for (int64_t begin = 0; begin < p.k; begin += kColumns) {
        const int count = static_cast<int>(std::min<int64_t>(kColumns, p.k - begin));
        mix(p, p.mixture->alpha_in, p.k, begin, count, p.mixture->gates + token * p.mixture->experts, factor);
        for (int i = 0; i < count; ++i) z[begin + i] *= factor[i];
    }
}

// The columns of token t in their own order, beside those of its neighbours.
void lay_plain(const Linear& p, int64_t t, const float* z, const int8_t* q, Ready& ready) {
    float* plain = ready.plain.get() + t / ready.lanes * ready.lanes * p.k + t % ready.lanes;
    if (q)  // in the order of int8_block
        for (int64_t k = 0; k < p.k; ++k) plain[k * ready.lanes] = q[k / 32 * 32 + k % 8 * 4 + k % 32 / 8];
    else
        for (int64_t k = 0; k < p.k; ++k) plain[k * ready.lanes] = z[k];
}

}  // namespace

Ready::Ready(const Linear& p, int64_t count) : tokens(allocate<Token>(count)), lanes(count == 1 ? 1 : kSalientLanes) {
    if (p.mode == kInt8Mode) {
        quantized = allocate<int8_t>(count * p.token_stride());
        totals = allocate<int32_t>(count * p.groups());
    } else {
        tables = allocate<float>(count * p.token_stride());
    }
    if (p.salient) {  // zeros for the lanes that no token takes
        plain = allocate<float>(round_up(count, lanes) * p.k);
        std::fill_n(plain.get(), round_up(count, lanes) * p.k, 0.0f);
    }
    scratch = allocate<float>(p.threads * p.padded());
}

void mix(const Linear& p, const float* alpha, int64_t width, int64_t begin, int count, const float* gates, float* out) {
    for (int64_t expert = 0; expert < p.mixture->experts; ++expert) {
        const float* of_expert = alpha + expert * width + begin;
        for (int i = 0; i < count; ++i) {
            const float term = gates[expert] * p.parameter(of_expert, i);
            out[i] = expert ? out[i] + term : term;
        }
    }
}

bool prepare(const Linear& p, int64_t first, int64_t t, float* z, Ready& ready) {
    read_token(p, first + t, z);
    Token& token = ready.tokens[t];
    token.shift = shift_of(p, z);
    scale_columns(p, first + t, z);
    if (p.mode == kInt8Mode) {
        int8_t* q = ready.quantized.get() + t * p.token_stride();
        token.scale = quantize(z, p.padded(), q);
        if (!std::isfinite(token.scale)) return false;
        total_groups(p, q, ready.totals.get() + t * p.groups());
        if (p.salient) lay_plain(p, t, nullptr, q, ready);
        if (p.by_rows()) order_by_rows(p, q, z);
    } else {
        token.scale = 1.0f;
        if (p.salient) lay_plain(p, t, z, nullptr, ready);
        p.set.float_tables(z, static_cast<int>(p.weight.padded_words()), ready.tables.get() + t * p.token_stride());
    }
    return true;
}

}  // namespace fbitrain
