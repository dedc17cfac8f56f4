// The forward pass of a whole decoder: one call per token or piece of a prompt.
#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "linear.h"
#include "threads.h"

namespace fbitrain {
namespace {

constexpr int64_t kHeadRows = 64;      // rows of the head per task
constexpr int64_t kDenseTokens = 4;    // from here on a block of the head is widened to float32 once for all tokens
constexpr int64_t kWorth = 16;         // binary weights that take as long to read as one weight of 16 bits

// What a pass needs beside the model, each [tokens][width] but for the scratch of attention, `scores`.
struct Activations {
    Buffer<float> residual, normed, query, key, value, mixed, gate, up, turns, scores;

    Activations(const DecoderModel& m, const DecoderCache& cache, const Pass& pass)
        : residual(allocate<float>(pass.tokens * m.d_model)), normed(allocate<float>(pass.tokens * m.d_model)),
          query(allocate<float>(pass.tokens * m.width())), key(allocate<float>(pass.tokens * m.kv_width())),
          value(allocate<float>(pass.tokens * m.kv_width())), mixed(allocate<float>(pass.tokens * m.width())),
          gate(allocate<float>(pass.tokens * m.d_ff)), up(allocate<float>(pass.tokens * m.d_ff)),
          turns(allocate<float>(pass.tokens * m.head_size)),
          scores(allocate<float>(pass.threads * scores_per_thread(pass, cache.capacity))) {}
};

class Decoder {
public:
    Decoder(const DecoderModel& model, const DecoderCache& cache, const KernelSet& set, const Pass& pass, int mode)
        : model_(model), cache_(cache), set_(set), pass_(pass), mode_(mode), a_(model, cache, pass) {}

    // Returns what `multiply` does.
    int64_t run(const int32_t* ids, float* hidden) {
        const int64_t row = model_.d_model * bytes_of(model_.format);
        for (int64_t t = 0; t < pass_.tokens; ++t)
            pass_.math.to_float(model_.format, static_cast<const char*>(model_.embedding) + ids[t] * row,
                                model_.d_model, a_.residual.get() + t * model_.d_model);
        find_turns(pass_, model_, a_.turns.get());
        for (int64_t layer = 0; layer < model_.n_layers; ++layer) {
            const LayerWeights& weights = model_.layers[layer];
            if (const int64_t status = attention(weights, LayerCache(model_, cache_, layer))) return status;
            if (const int64_t status = mlp(weights)) return status;
        }
        normalize(model_.final_norm, hidden);
        return kOk;
    }

private:
    int64_t attention(const LayerWeights& w, const LayerCache& cache) {
        normalize(w.attention_norm, a_.normed.get());
        const float* x = a_.normed.get();
        const Linear inputs[] = {linear(w.query, x, model_.d_model, a_.query.get(), model_.width()),
                                 linear(w.key, x, model_.d_model, a_.key.get(), model_.kv_width()),
                                 linear(w.value, x, model_.d_model, a_.value.get(), model_.kv_width())};
        if (const int64_t status = multiply(inputs, 3)) return status;
        rotate_and_store(pass_, model_, cache, a_.turns.get(), a_.query.get(), a_.key.get(), a_.value.get());
        attend(pass_, model_, cache, a_.query.get(), a_.scores.get(), a_.mixed.get());
        return add(w.output, a_.mixed.get(), model_.width());
    }

    int64_t mlp(const LayerWeights& w) {
        normalize(w.mlp_norm, a_.normed.get());
        const Linear inputs[] = {linear(w.gate, a_.normed.get(), model_.d_model, a_.gate.get(), model_.d_ff),
                                 linear(w.up, a_.normed.get(), model_.d_model, a_.up.get(), model_.d_ff)};
        if (const int64_t status = multiply(inputs, 2)) return status;
        by_token(model_.d_ff, [&](int64_t t) {
            pass_.math.swiglu(a_.up.get() + t * model_.d_ff, model_.d_ff, a_.gate.get() + t * model_.d_ff);
        });
        return add(w.down, a_.gate.get(), model_.d_ff);
    }

    // residual += x times the weight.
    int64_t add(const BinaryWeight& weight, const float* x, int64_t k) {
        const Linear product = linear(weight, x, k, a_.normed.get(), model_.d_model);
        if (const int64_t status = multiply(&product, 1)) return status;
        by_token(model_.d_model, [&](int64_t t) {
            float* residual = a_.residual.get() + t * model_.d_model;
            const float* y = a_.normed.get() + t * model_.d_model;
            for (int64_t i = 0; i < model_.d_model; ++i) residual[i] += y[i];
        });
        return kOk;
    }

    void normalize(const float* weight, float* y) const {
        by_token(model_.d_model, [&](int64_t t) {
            pass_.math.rms_norm(a_.residual.get() + t * model_.d_model, weight, model_.epsilon, model_.d_model,
                                y + t * model_.d_model);
        });
    }

    template <typename Body>
    void by_token(int64_t width, const Body& body) const {
        const int64_t work = kWorth * pass_.tokens * width;
        parallel_for(useful_threads(pass_.threads, work), pass_.tokens, [&](int64_t t, int) { body(t); });
    }

    Linear linear(const BinaryWeight& w, const float* x, int64_t k, float* y, int64_t n) const {
        const Weight weight{w.words, n, (k + kWordBits - 1) / kWordBits};
        return {set_,    pass_.threads, mode_,  0, model_.scale, x, weight,
                w.alpha, w.beta,        y, pass_.tokens, k, model_.group_size};
    }

    const DecoderModel& model_;
    const DecoderCache& cache_;
    const KernelSet& set_;
    const Pass& pass_;
    const int mode_;
    Activations a_;
};

// Logits of kWidth rows of the head, for many tokens: the rows are widened to columns of float32, then they are multiplied
// as attention multiplies its blocks. `scratch` holds (d_model + tokens) * kWidth + d_model elements.
void head_block(const DecoderModel& model, const Pass& pass, int64_t begin, const float* hidden, float* scratch,
                float* logits) {
    const int64_t rows = std::min<int64_t>(kWidth, model.vocab_size - begin), k = model.d_model;
    float *columns = scratch + k * kWidth, *widened = columns + pass.tokens * kWidth;
    const char* from = static_cast<const char*>(model.head) + begin * k * bytes_of(model.format);
    std::fill_n(scratch, k * kWidth, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
        pass.math.to_float(model.format, from + r * k * bytes_of(model.format), k, widened);
        for (int64_t i = 0; i < k; ++i) scratch[i * kWidth + r] = widened[i];
    }
    pass.math.product(kFloat32, hidden, k, pass.tokens, scratch, kWidth, k, columns, kWidth);
    for (int64_t t = 0; t < pass.tokens; ++t)
        std::memcpy(logits + t * model.vocab_size + begin, columns + t * kWidth, sizeof(float) * rows);
}

void head(const DecoderModel& model, const Pass& pass, const float* hidden, float* logits) {
    const int64_t k = model.d_model, row = k * bytes_of(model.format);
    const int threads = useful_threads(pass.threads, kWorth * pass.tokens * model.vocab_size * k);
    if (pass.tokens >= kDenseTokens) {
        const int64_t each = (k + pass.tokens) * kWidth + k;
        const auto blocks = allocate<float>(threads * each);
        parallel_for(threads, (model.vocab_size + kWidth - 1) / kWidth, [&](int64_t task, int thread) {
            head_block(model, pass, task * kWidth, hidden, blocks.get() + thread * each, logits);
        });
        return;
    }
    parallel_for(threads, (model.vocab_size + kHeadRows - 1) / kHeadRows, [&](int64_t task, int) {
        const int64_t begin = task * kHeadRows, rows = std::min(kHeadRows, model.vocab_size - begin);
        for (int64_t t = 0; t < pass.tokens; ++t)
            pass.math.dot_rows(model.format, static_cast<const char*>(model.head) + begin * row, k, rows, hidden + t * k,
                               logits + t * model.vocab_size + begin);
    });
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

}  // namespace
}  // namespace fbitrain

// hidden [tokens][d_model]: what the head is given for the tokens `ids`, which stand at positions first, first + 1 and so
// on; the cache holds all positions before and receives these. Returns a Status, or 1 + the number of the first token whose
// activations are NaN or infinite, in int8 mode; hidden and these positions of the cache are then unspecified.
extern "C" FBITRAIN_EXPORT int64_t fbitrain_decoder_hidden(int level, int threads, int mode,
                                                           const fbitrain::DecoderModel* model,
                                                           const fbitrain::DecoderCache* cache, const int32_t* ids,
                                                           int64_t first, int64_t tokens, float* hidden) noexcept {
    using namespace fbitrain;
    const KernelSet* set = kernel_set(level);
    if (!set) return kNoLevel;
    if (!is_model(model) || !is_cache(cache) || threads < 1 || (mode != kFloatMode && mode != kInt8Mode))
        return kBadArgument;
    if (first < 0 || tokens < 0 || tokens > cache->capacity - first) return kBadArgument;
    if (tokens == 0) return kOk;
    if (!ids || !hidden) return kBadArgument;
    for (int64_t t = 0; t < tokens; ++t)
        if (ids[t] < 0 || ids[t] >= model->vocab_size) return kBadArgument;
    try {
        const Pass pass{math_set(level), threads, first, tokens};
        return Decoder(*model, *cache, *set, pass, mode).run(ids, hidden);
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
        head(*model, {math_set(level), threads, 0, tokens}, hidden, logits);
    } catch (const std::bad_alloc&) {
        return kNoMemory;
    }
    return kOk;
}
