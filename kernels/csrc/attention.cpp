// Rotary embedding, the cache of keys and values, and attention over it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder.h"
#include "panel.h"
#include "threads.h"

namespace fbitrain {
namespace {

constexpr int64_t kQueries = 48;  // tokens of one head that share a pass over its keys and values
constexpr int64_t kMixed = 64;    // positions whose values stay in the L1 cache while the queries mix them
constexpr int64_t kTogether = 12; // queries that leave out together what none of them sees: two tiles of `product`
constexpr int64_t kWorth = 8;     // binary weights that take as long as one multiply-add of floats here
constexpr int64_t kTurnWorth = 256;   // and as long as a sine and a cosine
constexpr int64_t kRotateWorth = 64;  // and as long as turning an element and putting it into the cache

// The rotation of Hugging Face's Llama: element i turns with element i + head_size / 2. `turn` holds the cosines of all i,
// then the sines.
void rotate(int64_t half, const float* turn, float* head) {
    for (int64_t i = 0; i < half; ++i) {
        const float cosine = turn[i], sine = turn[half + i], a = head[i], b = head[i + half];
        head[i] = a * cosine - b * sine;
        head[i + half] = b * cosine + a * sine;
    }
}

// One key into column `position` of its block, which lies across.
template <typename Element>
void store_key(const LayerCache& cache, int64_t head, int64_t position, const Element* key) {
    auto* to = reinterpret_cast<Element*>(cache.key_block(head, position / kWidth)) + position % kWidth;
    for (int64_t i = 0; i < cache.head_size; ++i) to[i * kWidth] = key[i];
}

void store(const Pass& pass, const LayerCache& cache, int64_t head, int64_t position, const float* key,
           const float* value) {
    if (cache.format == kFloat32) {
        store_key(cache, head, position, key);
        std::memcpy(cache.value(head, position), value, sizeof(float) * cache.head_size);
        return;
    }
    uint16_t halves[kMaxHeadSize];
    pass.math.to_half(key, cache.head_size, halves);
    store_key(cache, head, position, halves);
    pass.math.to_half(value, cache.head_size, reinterpret_cast<uint16_t*>(cache.value(head, position)));
}

// The scratch of one thread, `floats` long.
struct Scratch {
    int64_t padded_head, row;  // row: from one query's scores to the next, with a skew as between tokens (panel.h)

    Scratch(const LayerCache& cache) : padded_head(cache.padded_head), row(cache.capacity + kSkew / 4) {}
    int64_t floats(int64_t queries) const { return queries * (padded_head + row); }
};

// A few queries of one head, on one thread.
class Queries {
public:
    Queries(const Pass& pass, const DecoderModel& model, const LayerCache& cache, int64_t head, int64_t begin,
            float* scratch)
        : pass_(pass), model_(model), cache_(cache), head_(head), kv_head_(head / (model.n_heads / model.n_kv_heads)),
          begin_(begin), count_(std::min(kQueries, pass.tokens - begin)), first_(pass.first + begin),
          row_(Scratch(cache).row), sums_(scratch), scores_(sums_ + count_ * cache.padded_head) {}

    void run(const float* query, float* mixed) {
        score(query + begin_ * model_.width() + head_ * model_.head_size);
        float totals[kQueries];
        for (int64_t t = 0; t < count_; ++t) {
            float* row = scores_ + t * row_;
            totals[t] = pass_.math.powers(row, seen(t), 1.0f / std::sqrt(static_cast<float>(model_.head_size)));
            std::fill(row + seen(t), row + seen(last_together(t)), 0.0f);
        }
        mix();
        mixed += begin_ * model_.width() + head_ * model_.head_size;
        for (int64_t t = 0; t < count_; ++t) {
            const float inverse = 1.0f / totals[t];
            for (int64_t i = 0; i < model_.head_size; ++i)
                mixed[t * model_.width() + i] = sums_[t * cache_.padded_head + i] * inverse;
        }
    }

private:
    int64_t seen(int64_t t) const { return first_ + t + 1; }  // positions that query t sees
    int64_t last_together(int64_t t) const { return std::min(t / kTogether * kTogether + kTogether, count_) - 1; }

    // Blocks of keys times the queries that see them.
    void score(const float* query) {
        for (int64_t block = 0; block * kWidth < seen(count_ - 1); ++block) {
            const int64_t t = std::max<int64_t>(0, block * kWidth - first_);
            pass_.math.product(cache_.format, query + t * model_.width(), model_.width(), count_ - t,
                               cache_.key_block(kv_head_, block), kWidth, model_.head_size,
                               scores_ + t * row_ + block * kWidth, row_, false);
        }
    }

    void mix() {
        for (int64_t position = 0; position < seen(count_ - 1); position += kMixed)
            for (int64_t t = 0; t < count_; t += kTogether) {
                const int64_t last = last_together(t), positions = std::min(kMixed, seen(last) - position);
                if (positions > 0) mix(position, positions, t, last + 1 - t);
            }
    }

    void mix(int64_t position, int64_t positions, int64_t t, int64_t count) {
        for (int64_t column = 0; column < cache_.padded_head; column += kWidth)
            pass_.math.product(cache_.format, scores_ + t * row_ + position, row_, count,
                               cache_.value(kv_head_, position) + column * bytes_of(cache_.format), cache_.padded_head,
                               positions, sums_ + t * cache_.padded_head + column, cache_.padded_head, position > 0);
    }

    const Pass& pass_;
    const DecoderModel& model_;
    const LayerCache& cache_;
    const int64_t head_, kv_head_, begin_, count_, first_, row_;
    float *sums_, *scores_;
};

}  // namespace

LayerCache::LayerCache(const DecoderModel& model, const DecoderCache& cache, int64_t layer)
    : capacity(cache.capacity), head_size(model.head_size), padded_head(round_up(model.head_size, kWidth)),
      format(cache.format) {
    const int64_t rows = layer * model.n_kv_heads * capacity * bytes_of(format);
    keys = static_cast<char*>(cache.keys) + rows * head_size;
    values = static_cast<char*>(cache.values) + rows * padded_head;
}

void find_turns(const Pass& pass, const DecoderModel& model, float* turns) {
    const int64_t half = model.head_size / 2;
    parallel_for(useful_threads(pass.threads, kTurnWorth * pass.tokens * half), pass.tokens, [&](int64_t t, int) {
        for (int64_t i = 0; i < half; ++i) {
            const float angle = static_cast<float>(pass.first + t) * model.frequencies[i];
            turns[t * model.head_size + i] = std::cos(angle);
            turns[t * model.head_size + half + i] = std::sin(angle);
        }
    });
}

void rotate_queries(const Pass& pass, const DecoderModel& model, const float* turns, float* query) {
    const int64_t work = kRotateWorth * pass.tokens * model.width();
    parallel_for(useful_threads(pass.threads, work), pass.tokens, [&](int64_t t, int) {
        for (int64_t head = 0; head < model.n_heads; ++head)
            rotate(model.head_size / 2, turns + t * model.head_size, query + t * model.width() + head * model.head_size);
    });
}

void store_keys(const Pass& pass, const DecoderModel& model, const LayerCache& cache, const float* turns, float* key,
                const float* value) {
    const int64_t work = kRotateWorth * pass.tokens * model.kv_width();
    // Heads, not tokens, are the tasks: neighbouring positions share cache lines of the keys.
    parallel_for(useful_threads(pass.threads, work), model.n_kv_heads, [&](int64_t head, int) {
        for (int64_t t = 0; t < pass.tokens; ++t) {
            const int64_t at = t * model.kv_width() + head * model.head_size;
            rotate(model.head_size / 2, turns + t * model.head_size, key + at);
            store(pass, cache, head, pass.first + t, key + at, value + at);
        }
    });
}

int64_t attention_scratch(const DecoderModel& model, const DecoderCache& cache, int64_t tokens) {
    return Scratch(LayerCache(model, cache, 0)).floats(std::min(kQueries, tokens));
}

void attend(const Pass& pass, const DecoderModel& model, const LayerCache& cache, const float* query, float* scratch,
            float* mixed) {
    const int64_t each = Scratch(cache).floats(std::min(kQueries, pass.tokens));
    const int64_t blocks = (pass.tokens + kQueries - 1) / kQueries;
    const int64_t work = kWorth * pass.tokens * (pass.first + pass.tokens) * model.width();
    parallel_for(useful_threads(pass.threads, work), model.n_heads * blocks, [&](int64_t task, int thread) {
        Queries(pass, model, cache, task / blocks, task % blocks * kQueries, scratch + thread * each)
            .run(query, mixed);
    });
}

}  // namespace fbitrain
