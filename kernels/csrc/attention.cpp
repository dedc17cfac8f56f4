// Rotary embedding, the cache of keys and values, and attention over it.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder.h"
#include "panel.h"
#include "threads.h"

namespace fbitrain {
namespace {

constexpr int64_t kQueries = 24;  // tokens of one head that share a pass over its keys: four tiles of `product`
constexpr int64_t kWorth = 8;     // binary weights that take as long as one multiply-add of floats here
constexpr int64_t kTurnWorth = 256;  // and as long as a sine and a cosine

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

// A few queries of one head, on one thread. `scores` is [kQueries][capacity].
class Queries {
public:
    Queries(const Pass& pass, const DecoderModel& model, const LayerCache& cache, int64_t head, int64_t begin,
            float* scores)
        : pass_(pass), model_(model), cache_(cache), head_(head), kv_head_(head / (model.n_heads / model.n_kv_heads)),
          begin_(begin), count_(std::min(kQueries, pass.tokens - begin)), end_(pass.first + begin + count_),
          scores_(scores) {}

    void run(const float* query, float* mixed) {
        score(query + begin_ * model_.width() + head_ * model_.head_size);
        for (int64_t t = 0; t < count_; ++t) {
            float* row = scores_ + t * cache_.capacity;
            const int64_t seen = pass_.first + begin_ + t + 1;
            pass_.math.softmax(row, seen, 1.0f / std::sqrt(static_cast<float>(model_.head_size)));
            std::fill(row + seen, row + end_, 0.0f);
        }
        mix(mixed + begin_ * model_.width() + head_ * model_.head_size);
    }

private:
    void score(const float* query) {
        for (int64_t block = 0; block * kWidth < end_; ++block)
            pass_.math.product(cache_.format, query, model_.width(), count_, cache_.key_block(kv_head_, block), kWidth,
                               model_.head_size, scores_ + block * kWidth, cache_.capacity);
    }

    void mix(float* mixed) {
        alignas(64) float columns[kQueries][kWidth];
        for (int64_t column = 0; column < model_.head_size; column += kWidth) {
            const char* values = cache_.value(kv_head_, 0) + column * bytes_of(cache_.format);
            pass_.math.product(cache_.format, scores_, cache_.capacity, count_, values, cache_.padded_head, end_,
                               columns[0], kWidth);
            const int64_t present = std::min<int64_t>(kWidth, model_.head_size - column);
            for (int64_t t = 0; t < count_; ++t)
                std::memcpy(mixed + t * model_.width() + column, columns[t], sizeof(float) * present);
        }
    }

    const Pass& pass_;
    const DecoderModel& model_;
    const LayerCache& cache_;
    const int64_t head_, kv_head_, begin_, count_;
    const int64_t end_;  // positions that the last query sees
    float* scores_;
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

void rotate_and_store(const Pass& pass, const DecoderModel& model, const LayerCache& cache, const float* turns,
                      float* query, float* key, const float* value) {
    const int64_t heads = model.n_heads + model.n_kv_heads, half = model.head_size / 2;
    const int64_t work = kWorth * kWorth * pass.tokens * heads * model.head_size;
    // Heads, not tokens, are the tasks: neighbouring positions share cache lines of the keys.
    parallel_for(useful_threads(pass.threads, work), heads, [&](int64_t task, int) {
        for (int64_t t = 0; t < pass.tokens; ++t) {
            const float* turn = turns + t * model.head_size;
            if (task < model.n_heads) {
                rotate(half, turn, query + t * model.width() + task * model.head_size);
            } else {
                const int64_t head = task - model.n_heads, at = t * model.kv_width() + head * model.head_size;
                rotate(half, turn, key + at);
                store(pass, cache, head, pass.first + t, key + at, value + at);
            }
        }
    });
}

int64_t scores_per_thread(const Pass& pass, int64_t capacity) { return std::min(kQueries, pass.tokens) * capacity; }

void attend(const Pass& pass, const DecoderModel& model, const LayerCache& cache, const float* query, float* scores,
            float* mixed) {
    const int64_t each = scores_per_thread(pass, cache.capacity);
    const int64_t blocks = (pass.tokens + kQueries - 1) / kQueries;
    const int64_t work = kWorth * pass.tokens * (pass.first + pass.tokens) * model.width();
    parallel_for(useful_threads(pass.threads, work), model.n_heads * blocks, [&](int64_t task, int thread) {
        Queries(pass, model, cache, task / blocks, task % blocks * kQueries, scores + thread * each)
            .run(query, mixed);
    });
}

}  // namespace fbitrain
