// A whole Llama decoder with binary Linears, as Python describes it (kernels/decoder.py mirrors the structs).
// Everything that pointers lead to is the caller's and only read, but for the cache.
#pragma once

#include <algorithm>

#include "dense_math.h"
#include "kernels.h"
#include "threads.h"

namespace fbitrain {

constexpr int64_t kMaxHeadSize = 1024;
constexpr int64_t kDenseWorth = 16;  // binary weights that take as long to read as one weight of 16 bits

// A weight [N][ceil(K / 32)] with its scales, in the shapes of fbitrain_binary_linear; beta is null where there is
// none. `interleaved` is what fbitrain_interleave makes of the words, or null.
struct BinaryWeight {
    const uint32_t* words;
    const float *alpha, *beta;
    const uint32_t* interleaved;
};

struct LayerWeights {
    BinaryWeight query, key, value, output, gate, up, down;
    const float *attention_norm, *mlp_norm;  // [d_model]
};

struct DecoderModel {
    const LayerWeights* layers;
    const void *embedding, *head;  // [vocab_size][d_model] of `format`
    const float* final_norm;       // [d_model]
    const float* frequencies;      // [head_size / 2]: radians per position of the rotary embedding
    int64_t n_layers, d_model, d_ff, n_heads, n_kv_heads, head_size, vocab_size, group_size;
    int32_t scale, format;
    float epsilon;

    int64_t width() const { return n_heads * head_size; }
    int64_t kv_width() const { return n_kv_heads * head_size; }
    const char* head_row(int64_t row) const {
        return static_cast<const char*>(head) + row * d_model * bytes_of(format);
    }
};

// Keys and values of the positions so far, float16 or float32 by `format`. Both are made of blocks of kWidth positions,
// so that `product` reads them as they lie: keys [n_layers][n_kv_heads][capacity / kWidth][head_size][kWidth], values
// [n_layers][n_kv_heads][capacity][head_size rounded up to kWidth]. capacity is a multiple of kWidth.
struct DecoderCache {
    void *keys, *values;
    int64_t capacity;
    int32_t format;
};

// Where one layer's part of a cache lies, and its strides in elements.
struct LayerCache {
    char *keys, *values;
    int64_t capacity, head_size, padded_head;
    int format;

    LayerCache(const DecoderModel& model, const DecoderCache& cache, int64_t layer);
    char* key_block(int64_t head, int64_t block) const {
        return keys + (head * capacity + block * kWidth) * head_size * bytes_of(format);
    }
    char* value(int64_t head, int64_t position) const {
        return values + (head * capacity + position) * padded_head * bytes_of(format);
    }
};

// Some tokens at consecutive positions, and what computes them.
struct Pass {
    const MathSet& math;
    int threads;
    int64_t first, tokens;  // the first token's position, and how many there are
};

// turns [tokens][head_size]: cosines, then sines, of the angles by which rotary embedding turns each position.
void find_turns(const Pass& pass, const DecoderModel& model, float* turns);

// Turns query [tokens][n_heads * head_size].
void rotate_queries(const Pass& pass, const DecoderModel& model, const float* turns, float* query);

// Turns key [tokens][n_kv_heads * head_size], then puts it and value of the same shape into the cache.
void store_keys(const Pass& pass, const DecoderModel& model, const LayerCache& cache, const float* turns, float* key,
                const float* value);

// mixed [tokens][n_heads * head_size] = causal softmax attention of query over the cache. `scores` is scratch of
// pass.threads * scores_per_thread elements.
void attend(const Pass& pass, const DecoderModel& model, const LayerCache& cache, const float* query, float* scores,
            float* mixed);
int64_t scores_per_thread(int64_t tokens, int64_t capacity);

// Calls body(begin, apart, rows) for all rows of a head, which comes from memory: it is to read rows begin .. begin +
// rows and, if apart is not 0, those `apart`, 2 * apart and so on after each, kStreams in all.
constexpr int64_t kHeadRows = 16;  // per task and stream
template <typename Body>
void by_head_rows(int threads, int64_t vocab_size, const Body& body) {
    const int64_t apart = vocab_size / kStreams, rest = apart * kStreams;
    parallel_for(threads, (apart + kHeadRows - 1) / kHeadRows, [&](int64_t task, int) {
        body(task * kHeadRows, apart, std::min(kHeadRows, apart - task * kHeadRows));
    });
    if (rest < vocab_size) body(rest, int64_t{0}, vocab_size - rest);
}

// logits [tokens][vocab_size] of hidden [tokens][d_model].
void find_logits(const DecoderModel& model, const Pass& pass, const float* hidden, float* logits);

}  // namespace fbitrain
