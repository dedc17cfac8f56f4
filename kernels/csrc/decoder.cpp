// The forward pass of a whole decoder: one call per token or piece of a prompt.
#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "head_screen.h"
#include "linear.h"
#include "threads.h"

namespace fbitrain {
namespace {

// Tokens that go through the layers together: full blocks of the products.
int64_t piece_of(const KernelSet& set) { return set.lookup_panels ? 4 * kMaxTokens : kBlockTokens; }

// Some of the tokens of a piece.
struct Rows {
    int64_t begin, count;
};

// What the layers need beside the model, each [tokens][width] but for the scratch of attention, `scores`.
struct Activations {
    Buffer<float> residual, normed, query, key, value, mixed, gate, up, turns, scores;

    Activations(const DecoderModel& m, const DecoderCache& cache, int threads, int64_t tokens)
        : residual(allocate<float>(tokens * m.d_model)), normed(allocate<float>(tokens * m.d_model)),
          query(allocate<float>(tokens * m.width())), key(allocate<float>(tokens * m.kv_width())),
          value(allocate<float>(tokens * m.kv_width())), mixed(allocate<float>(tokens * m.width())),
          gate(allocate<float>(tokens * m.d_ff)), up(allocate<float>(tokens * m.d_ff)),
          turns(allocate<float>(tokens * m.head_size)),
          scores(allocate<float>(threads * scores_per_thread(tokens, cache.capacity))) {}
};

// A piece of a text on its way through the layers.
class Piece {
public:
    Piece(const DecoderModel& model, const DecoderCache& cache, const KernelSet& set, const Pass& pass, int mode,
          const Activations& activations)
        : model_(model), cache_(cache), set_(set), pass_(pass), mode_(mode), a_(activations) {}

    // hidden [count - unwanted][d_model]: of the tokens after the first `unwanted`, of which the last layer needs no
    // more than keys and values. Returns what `multiply` does.
    int64_t run(const int32_t* ids, int64_t unwanted, float* hidden) {
        const int64_t row = model_.d_model * bytes_of(model_.format);
        for (int64_t t = 0; t < pass_.tokens; ++t)
            pass_.math.to_float(model_.format, static_cast<const char*>(model_.embedding) + ids[t] * row,
                                model_.d_model, a_.residual.get() + t * model_.d_model);
        find_turns(pass_, model_, a_.turns.get());
        for (int64_t layer = 0; layer < model_.n_layers; ++layer) {
            const LayerWeights& weights = model_.layers[layer];
            const LayerCache cache(model_, cache_, layer);
            const int64_t begin = layer + 1 == model_.n_layers ? unwanted : 0;
            const Rows rows{begin, pass_.tokens - begin};
            if (const int64_t status = inputs(weights, cache, rows)) return status;
            if (rows.count == 0) return kOk;
            if (const int64_t status = attention(weights, cache, rows)) return status;
            if (const int64_t status = mlp(weights, rows)) return status;
        }
        const Rows wanted{unwanted, pass_.tokens - unwanted};
        normalize(model_.final_norm, wanted);
        std::copy_n(a_.normed.get() + wanted.begin * model_.d_model, wanted.count * model_.d_model, hidden);
        return kOk;
    }

private:
    // The queries of some tokens; keys and values of all, which go into the cache.
    int64_t inputs(const LayerWeights& w, const LayerCache& cache, Rows rows) {
        const Rows all{0, pass_.tokens};
        normalize(w.attention_norm, all);
        const Linear products[] = {linear(w.query, a_.normed, model_.d_model, a_.query, model_.width(), rows),
                                   linear(w.key, a_.normed, model_.d_model, a_.key, model_.kv_width(), all),
                                   linear(w.value, a_.normed, model_.d_model, a_.value, model_.kv_width(), all)};
        if (rows.count == all.count) {
            if (const int64_t status = product(products, 3, all)) return status;
        } else {
            if (const int64_t status = product(products + 1, 2, all)) return status;
            if (const int64_t status = product(products, 1, rows)) return status;
        }
        store_keys(pass_, model_, cache, a_.turns.get(), a_.key.get(), a_.value.get());
        return kOk;
    }

    int64_t attention(const LayerWeights& w, const LayerCache& cache, Rows rows) {
        const Pass pass{pass_.math, pass_.threads, pass_.first + rows.begin, rows.count};
        float* query = a_.query.get() + rows.begin * model_.width();
        rotate_queries(pass, model_, a_.turns.get() + rows.begin * model_.head_size, query);
        attend(pass, model_, cache, query, a_.scores.get(), a_.mixed.get() + rows.begin * model_.width());
        return add(w.output, a_.mixed, model_.width(), rows);
    }

    int64_t mlp(const LayerWeights& w, Rows rows) {
        normalize(w.mlp_norm, rows);
        const Linear products[] = {linear(w.gate, a_.normed, model_.d_model, a_.gate, model_.d_ff, rows),
                                   linear(w.up, a_.normed, model_.d_model, a_.up, model_.d_ff, rows)};
        if (const int64_t status = product(products, 2, rows)) return status;
        by_token(model_.d_ff, rows, [&](int64_t t) {
            pass_.math.swiglu(a_.up.get() + t * model_.d_ff, model_.d_ff, a_.gate.get() + t * model_.d_ff);
        });
        return add(w.down, a_.gate, model_.d_ff, rows);
    }

    // residual += x times the weight.
    int64_t add(const BinaryWeight& weight, const Buffer<float>& x, int64_t k, Rows rows) {
        const Linear linear_of_x = linear(weight, x, k, a_.normed, model_.d_model, rows);
        if (const int64_t status = product(&linear_of_x, 1, rows)) return status;
        by_token(model_.d_model, rows, [&](int64_t t) {
            float* residual = a_.residual.get() + t * model_.d_model;
            const float* y = a_.normed.get() + t * model_.d_model;
            for (int64_t i = 0; i < model_.d_model; ++i) residual[i] += y[i];
        });
        return kOk;
    }

    void normalize(const float* weight, Rows rows) const {
        by_token(model_.d_model, rows, [&](int64_t t) {
            const int64_t at = t * model_.d_model;
            pass_.math.rms_norm(a_.residual.get() + at, weight, model_.epsilon, model_.d_model, a_.normed.get() + at);
        });
    }

    template <typename Body>
    void by_token(int64_t width, Rows rows, const Body& body) const {
        const int64_t work = kDenseWorth * rows.count * width;
        parallel_for(useful_threads(pass_.threads, work), rows.count, [&](int64_t t, int) { body(rows.begin + t); });
    }

    // What `multiply` returns, a token's number being the one in the piece.
    int64_t product(const Linear* linears, int count, Rows rows) const {
        if (rows.count == 0) return kOk;
        const int64_t status = multiply(linears, count);
        return status > 0 ? rows.begin + status : status;
    }

    Linear linear(const BinaryWeight& w, const Buffer<float>& x, int64_t k, const Buffer<float>& y, int64_t n,
                  Rows rows) const {
        const Weight weight{w.words, n, (k + kWordBits - 1) / kWordBits, w.interleaved};
        return {.set = set_,
                .threads = pass_.threads,
                .mode = mode_,
                .bfloat16 = 0,
                .scale = model_.scale,
                .x = x.get() + rows.begin * k,
                .weight = weight,
                .alpha = w.alpha,
                .beta = w.beta,
                .y = y.get() + rows.begin * n,
                .m = rows.count,
                .k = k,
                .group_size = model_.group_size};
    }

    const DecoderModel& model_;
    const DecoderCache& cache_;
    const KernelSet& set_;
    const Pass& pass_;
    const int mode_;
    const Activations& a_;
};

// hidden [wanted][d_model] of the last tokens. Returns what `multiply` does.
int64_t read(const DecoderModel& model, const DecoderCache& cache, const KernelSet& set, const Pass& pass, int mode,
             const int32_t* ids, int64_t wanted, float* hidden) {
    const int64_t pieces = (pass.tokens + piece_of(set) - 1) / piece_of(set);
    const Activations activations(model, cache, pass.threads, (pass.tokens + pieces - 1) / pieces);
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t begin = piece * pass.tokens / pieces, end = (piece + 1) * pass.tokens / pieces;
        const int64_t unwanted = std::min(std::max(pass.tokens - wanted, begin), end) - begin;
        const Pass part{pass.math, pass.threads, pass.first + begin, end - begin};
        const int64_t status = Piece(model, cache, set, part, mode, activations).run(ids + begin, unwanted, hidden);
        if (status) return status > 0 ? begin + status : status;
        hidden += (end - begin - unwanted) * model.d_model;
    }
    return kOk;
}

bool is_format(int format) { return format >= kFloat32 && format <= kFloat16; }

bool is_model(const DecoderModel* m) {
    if (!m || !m->layers || !m->embedding || !m->head || !m->final_norm || !m->frequencies || !is_format(m->format))
        return false;
    const int64_t sizes[] = {m->n_layers, m->d_model, m->d_ff, m->n_heads, m->n_kv_heads, m->vocab_size};
    for (int64_t size : sizes)
        if (size < 1 || size > kMaxColumns) return false;
    if (m->n_heads % m->n_kv_heads || m->head_size < 2 || m->head_size % 2 || m->head_size > kMaxHeadSize) return false;
    if (m->scale != kGroup) return m->scale >= kColumn && m->scale <= kTensor;
    const int64_t g = m->group_size;
    return g >= kWordBits && g % kWordBits == 0 && m->d_model % g == 0 && m->d_ff % g == 0 && m->width() % g == 0;
}

bool is_cache(const DecoderCache* c) {
    return c && c->keys && c->values && c->capacity >= 1 && c->capacity % kWidth == 0 &&
           (c->format == kFloat32 || c->format == kFloat16);
}

bool is_screen(const uint8_t* codes, const float* bounds) {
    return codes && reinterpret_cast<uintptr_t>(codes) % 32 == 0 && bounds;
}

}  // namespace
}  // namespace fbitrain

// hidden [wanted][d_model]: what the head is given for the last `wanted` of the tokens `ids`, which stand at positions
// first, first + 1 and so on; the cache holds all positions before and receives these. Returns a Status, or 1 + the
// number of the first token found whose activations are NaN or infinite, in int8 mode; hidden and these positions of
// the cache are then unspecified.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_decoder_hidden(int level, int threads, int mode,
                                                           const fbitrain::DecoderModel* model,
                                                           const fbitrain::DecoderCache* cache, const int32_t* ids,
                                                           int64_t first, int64_t tokens, int64_t wanted,
                                                           float* hidden) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (!set) return kNoLevel;
    if (!is_model(model) || !is_cache(cache) || threads < 1 || (mode != kFloatMode && mode != kInt8Mode))
        return kBadArgument;
    if (first < 0 || tokens < 0 || tokens > cache->capacity - first || wanted < 0 || wanted > tokens)
        return kBadArgument;
    if (tokens == 0) return kOk;
    if (!ids || (wanted && !hidden)) return kBadArgument;
    for (int64_t t = 0; t < tokens; ++t)
        if (ids[t] < 0 || ids[t] >= model->vocab_size) return kBadArgument;
    try {
        return read(*model, *cache, *set, {math_set(level), threads, first, tokens}, mode, ids, wanted, hidden);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
}

// logits [tokens][vocab_size] of hidden [tokens][d_model]. Returns a Status.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_decoder_logits(int level, int threads, const fbitrain::DecoderModel* model,
                                                           const float* hidden, int64_t tokens,
                                                           float* logits) noexcept {
    using namespace fbitrain;
    if (!kernel_set(level)) return kNoLevel;
    if (!is_model(model) || threads < 1 || tokens < 0) return kBadArgument;
    if (tokens == 0) return kOk;
    if (!hidden || !logits) return kBadArgument;
    try {
        find_logits(*model, {math_set(level), threads, 0, tokens}, hidden, logits);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kOk;
}

// Bytes of a screen's codes for one row of a head of k columns; 0 where such a head has no screen.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_screen_bytes(int64_t k) noexcept {
    using namespace fbitrain;
    return k < 1 || k > kMaxScreened ? 0 : code_blocks(k) * kCodeBytes;
}

// A screen of the model's head: codes [vocab_size][fbitrain_screen_bytes], 32-byte aligned, and bounds [3][vocab_size].
// Returns a Status.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_screen_head(int level, int threads, const fbitrain::DecoderModel* model,
                                                        uint8_t* codes, float* bounds) noexcept {
    using namespace fbitrain;
    if (!kernel_set(level)) return kNoLevel;
    if (!is_model(model) || model->d_model > kMaxScreened || threads < 1 || !is_screen(codes, bounds))
        return kBadArgument;
    const int64_t rows = model->vocab_size;
    try {
        make_screen(*model, {math_set(level), threads, 0, 1}, codes, bounds, bounds + rows, bounds + 2 * rows);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kOk;
}

// token: which logit of hidden [d_model] is the largest, by the screen that fbitrain_screen_head made. Returns a
// Status.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_decoder_likeliest(int level, int threads,
                                                              const fbitrain::DecoderModel* model, const uint8_t* codes,
                                                              const float* bounds, const float* hidden,
                                                              int64_t* token) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (!set) return kNoLevel;
    if (!is_model(model) || model->d_model > kMaxScreened || threads < 1 || !is_screen(codes, bounds) || !hidden ||
        !token)
        return kBadArgument;
    const int64_t rows = model->vocab_size;
    const HeadScreen screen{codes, bounds, bounds + rows, bounds + 2 * rows};
    try {
        *token = find_likeliest(*model, {math_set(level), threads, 0, 1}, *set, screen, hidden);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kOk;
}
