// From x to what the block functions take: scaled, quantized and ordered, or turned into tables.
#include "tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "salient.h"

namespace fbitrain {
namespace {

// Up to here what does a token at a time is faster than putting the bits in order for lookup_panels. Beyond, that is
// faster, or as fast where there is a single panel.
constexpr int kRowTokens = 2;

// Tokens made ready at a time, which bounds the memory: 1 byte per column and token of int8, 8 or 16 of float tables, 8
// of tables for lookup_panels. Of tables as many as fit kTableBytes, a cache near by, within limits. Of floats 12 are
// as fast then as 24 if they fit, and 1.2 times as fast if they do not (AVX-512, 5632 columns). Of those for
// lookup_panels whole tiles of two: measured, 16 to 100 differ by 5 % at most for up to 11008 columns.
constexpr int64_t kTableBytes = int64_t{1} << 21;
constexpr int64_t kInt8Tokens = 2 * kBlockTokens, kFloatTokens = 24, kLeastFloats = 12;
constexpr int64_t kLeastLookups = 24, kLookupTokens = 2;

// Of int8, tokens multiplied at a time: as many as fit kBlockBytes, so that a cache near by keeps them for all panels,
// within limits, in whole tiles of AMX. Measured with AMX: 192 are done 1.5 times as fast as 60, each, as they share
// the making of B.
constexpr int64_t kBlockBytes = int64_t{1} << 20, kLeastBlock = 64, kTileTokens = 16;

// What cuts `tokens` into parts of one size, at most `most`: one of a few tokens would read the whole weight for them.
int64_t equal_part(int64_t tokens, int64_t most, int64_t step) {
    const int64_t parts = (tokens + most - 1) / most;
    return std::min(tokens, round_up((tokens + parts - 1) / parts, step));
}

// z [padded] = x of a token, with alpha where that goes by columns. Returns the token's shift.
float read_token(const Linear& p, int64_t token, float* z) {
    const char* x = static_cast<const char*>(p.x) + token * p.k * (p.bfloat16 ? 2 : 4);
    const bool by_column = p.scale == kColumn;
    p.set.activations.scale_columns(x, p.bfloat16, by_column ? p.alpha : nullptr, p.k, z);
    std::fill(z + p.k, z + p.padded(), 0.0f);
    return p.beta ? p.set.activations.sum_columns(x, p.bfloat16, by_column ? p.beta : nullptr, p.k) : 0.0f;
}

// What row `row` of the operand leaves to be taken out of its sums. The order within a word does not matter: groups are
// whole words.
void total_groups(const Linear& p, const int8_t* q, int64_t row, Ready& ready) {
    const int64_t size = p.scale == kGroup ? p.group_size : p.padded();
    const Activations& sums = p.set.activations;
    const auto total = ready.plan.form == Form::kLookupPanels ? sums.sum_magnitudes : sums.sum_quantized;
    int32_t* totals = ready.totals.get() + row * p.groups();
    for (int64_t g = 0; g < p.groups(); ++g, q += size) totals[g] = total(q, size);
}

void make_lookups(const Linear& p, const int8_t* q, int64_t row, Ready& ready) {
    uint8_t* tables = ready.lookups.get() + row * ready.plan.stride;
    ready.flags[row] = p.set.lookup_tables(q, static_cast<int>(p.weight.padded_words()), tables);
}

// From the order of int8_block to that of int8_rows; the four columns of an i stay together.
void order_by_rows(const Linear& p, int64_t stride, int8_t* q, float* scratch) {
    const int64_t chunk = p.set.chunk_words, n_words = stride / kWordBits;
    std::memset(q + p.padded(), 0, static_cast<size_t>(stride - p.padded()));
    auto* from = reinterpret_cast<char*>(scratch);
    std::memcpy(from, q, static_cast<size_t>(stride));
    for (int64_t w = 0; w < n_words; ++w)
        for (int64_t j = 0; j < 8; ++j)
            std::memcpy(q + (w / chunk * chunk * 8 + j * chunk + w % chunk) * 4, from + (w * 8 + j) * 4, 4);
}

void mix_columns(const Linear& p, int64_t token, float* z) {
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

Plan plan_tokens(const Linear& p) {
    const int64_t n_words = p.weight.padded_words();
    // What is multiplied in digits is so for any number of tokens: a result does not depend on its neighbours.
    const bool look_up = p.set.lookup_panels && (p.m > kRowTokens || p.weight.interleaved);
    // Of digits up to 128, 2^24 columns would add up to 2^31.
    const bool digits =
        p.mode == kFloatMode && look_up && p.weight.interleaved && !p.salient && p.padded() < kMaxColumns;
    if (p.mode == kFloatMode && !digits) {
        const int64_t stride = n_words * p.set.floats_per_word + kSkew / 4;
        const bool all_fit = kFloatTokens * stride * static_cast<int64_t>(sizeof(float)) <= kTableBytes;
        const int64_t slab = std::min(p.m, all_fit ? kFloatTokens : kLeastFloats);
        return {Form::kFloatBlock, stride, slab, slab};
    }
    const int64_t slab = equal_part(p.m, kInt8Tokens, kTileTokens);
    if (!look_up && p.m <= kRowTokens && p.scale != kGroup && p.set.int8_rows)
        return {Form::kInt8Rows, round_up(p.padded(), p.set.chunk_words * kWordBits), slab, slab};
    if (!look_up) {
        const int64_t stride = p.padded() + kSkew, fitting = kBlockBytes / stride / kTileTokens * kTileTokens;
        if (p.salient) return {Form::kInt8Block, stride, slab, equal_part(slab, kSalientTokens, kSalientLanes)};
        if (p.scale == kGroup) return {Form::kInt8Block, stride, slab, equal_part(slab, kMaxTokens, 1)};
        const int64_t most = std::clamp<int64_t>(fitting, kLeastBlock, kBlockTokens);
        return {Form::kInt8Block, stride, slab, equal_part(slab, most, kTileTokens)};
    }
    const int64_t stride = n_words * p.set.lookup_bytes + kSkew;
    const int rows = digits ? kDigits : 1;
    const int64_t step = p.salient ? kSalientLanes : kLookupTokens;
    const int64_t most = std::clamp<int64_t>(kTableBytes / stride, kLeastLookups, kMaxTokens) / rows / step * step;
    const int64_t lookup_slab = equal_part(p.m, most, step);
    return {Form::kLookupPanels, stride, lookup_slab, lookup_slab, rows};
}

Ready::Ready(const Linear& p, const Plan& plan)
    : plan(plan), tokens(allocate<Token>(plan.slab)), lanes(plan.slab == 1 ? 1 : kSalientLanes) {
    const int64_t count = plan.slab * plan.rows;
    if (plan.form != Form::kFloatBlock) totals = allocate<int32_t>(count * p.groups());
    if (plan.form == Form::kFloatBlock)
        tables = allocate<float>(count * plan.stride);
    else if (plan.form == Form::kLookupPanels)
        lookups = allocate<uint8_t>(count * plan.stride), flags = allocate<bool>(count);
    else
        quantized = allocate<int8_t>(count * plan.stride);
    if (p.salient) {  // zeros for the lanes that no token takes
        plain = allocate<float>(round_up(count, lanes) * p.k);
        std::fill_n(plain.get(), round_up(count, lanes) * p.k, 0.0f);
    }
    scratch = allocate<float>(p.threads * scratch_of(p));
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
    Token& token = ready.tokens[t];
    token.shift = read_token(p, first + t, z);
    if (p.mixture) mix_columns(p, first + t, z);
    const int64_t start = t * ready.plan.stride;
    if (ready.plan.rows == kDigits) {
        auto* digits = reinterpret_cast<int8_t*>(z + p.padded());
        token.scale = p.set.activations.split_digits(z, p.padded(), digits);
        if (!std::isfinite(token.scale)) return false;
        for (int64_t row = t * kDigits; row < (t + 1) * kDigits; ++row, digits += p.padded()) {
            total_groups(p, digits, row, ready);
            make_lookups(p, digits, row, ready);
        }
    } else if (p.mode == kInt8Mode) {
        const bool lookup = ready.plan.form == Form::kLookupPanels;
        // In place, if for tables only.
        int8_t* q = lookup ? reinterpret_cast<int8_t*>(z) : ready.quantized.get() + start;
        token.scale = p.set.activations.quantize(z, p.padded(), q);
        if (!std::isfinite(token.scale)) return false;
        total_groups(p, q, t, ready);
        if (p.salient) lay_plain(p, t, nullptr, q, ready);
        if (lookup) make_lookups(p, q, t, ready);
        if (ready.plan.form == Form::kInt8Rows) order_by_rows(p, ready.plan.stride, q, z);
    } else {
        token.scale = 1.0f;
        if (p.salient) lay_plain(p, t, z, nullptr, ready);
        p.set.float_tables(z, static_cast<int>(p.weight.padded_words()), ready.tables.get() + start);
    }
    return true;
}

}  // namespace fbitrain
