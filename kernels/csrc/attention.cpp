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
constexpr int64_t kTurnWorth = 256;    // and as long as a sine and a cosine
constexpr int64_t kRotateWorth = 512;  // and as long as turning an element and putting it into the cache

// The rotation of Hugging Face's Llama: element i turns with element i + head_size / 2. `turn` holds the cosines of all
// i, then the sines.
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

// From one query's scores to the next, with a skew as between tokens (panel.h).
int64_t scores_stride(int64_t capacity) { return capacity + kSkew / 4; }

// A few queries of one head, on one thread. `scores` is [kQueries][stride].
class Queries {
public:
    Queries(const Pass& pass, const DecoderModel& model, const LayerCache& cache, int64_t head, int64_t begin,
            float* scores, int64_t stride)
        : pass_(pass), model_(model), cache_(cache), head_(head), kv_head_(head / (model.n_heads / model.n_kv_heads)),
          begin_(begin), count_(std::min(kQueries, pass.tokens - begin)), end_(pass.first + begin + count_),
          scores_(scores), stride_(stride) {}

    void run(const float* query, float* mixed) {
        score(query + begin_ * model_.width() + head_ * model_.head_size);
        for (int64_t t = 0; t < count_; ++t) {
            float* row = scores_ + t * stride_;
            const int64_t seen = pass_.first + begin_ + t + 1;
            sums_[t] = pass_.math.powers(row, seen, 1.0f / std::sqrt(static_cast<float>(model_.head_size)));
            std::fill(row + seen, row + end_, 0.0f);
        }
        mix(mixed + begin_ * model_.width() + head_ * model_.head_size);
    }

private:
    void score(const float* query) {
        for (int64_t block = 0; block * kWidth < end_; ++block) {
            fetch_values(block * kWidth);
            pass_.math.product(cache_.format, query, model_.width(), count_, cache_.key_block(kv_head_, block), kWidth,
                               model_.head_size, scores_ + block * kWidth, stride_);
        }
    }

    // The values that belong to a block of keys, which are wanted when all keys have been read.
    void fetch_values(int64_t position) const {
        const char* values = cache_.value(kv_head_, position);
        const int64_t bytes = kWidth * cache_.padded_head * bytes_of(cache_.format);
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(values + byte);
    }

    void mix(float* mixed) {
        alignas(64) float columns[kQueries][kWidth];
        for (int64_t column = 0; column < model_.head_size; column += kWidth) {
            const char* values = cache_.value(kv_head_, 0) + column * bytes_of(cache_.format);
            pass_.math.product(cache_.format, scores_, stride_, count_, values, cache_.padded_head, end_, columns[0],
                               kWidth);
            const int64_t present = std::min<int64_t>(kWidth, model_.head_size - column);
            for (int64_t t = 0; t < count_; ++t) {
                const float inverse = 1.0f / sums_[t];
                for (int64_t i = 0; i < present; ++i) mixed[t * model_.width() + column + i] = columns[t][i] * inverse;
            }
        }
    }

    const Pass& pass_;
    const DecoderModel& model_;
    const LayerCache& cache_;
    const int64_t head_, kv_head_, begin_, count_;
    const int64_t end_;  // positions that the last query sees
    float* scores_;
    const int64_t stride_;
    float sums_[kQueries];
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
            rotate(model.head_size / 2, turns + t * model.head_size,
                   query + t * model.width() + head * model.head_size);
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

int64_t scores_per_thread(int64_t tokens, int64_t capacity) {
    return std::min(kQueries, tokens) * scores_stride(capacity);
}

void attend(const Pass& pass, const DecoderModel& model, const LayerCache& cache, const float* query, float* scores,
            float* mixed) {
    const int64_t stride = scores_stride(cache.capacity), each = scores_per_thread(pass.tokens, cache.capacity);
    const int64_t blocks = (pass.tokens + kQueries - 1) / kQueries;
    const int64_t work = kWorth * pass.tokens * (pass.first + pass.tokens) * model.width();
    parallel_for(useful_threads(pass.threads, work), model.n_heads * blocks, [&](int64_t task, int thread) {
        Queries(pass, model, cache, task / blocks, task % blocks * kQueries, scores + thread * each, stride)
            .run(query, mixed);
    });
}

}  // namespace fbitrain
