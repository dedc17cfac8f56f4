// The head of a decoder: logits of what the layers computed.
#include <algorithm>
#include <cstring>

#include "decoder.h"

namespace fbitrain {
namespace {

constexpr int64_t kDenseTokens = 4;  // from here on a block of the head is widened to float32 once for all tokens

// Logits of kWidth rows of the head, for many tokens: the rows are widened to columns of float32, then they are
// multiplied as attention multiplies its blocks. `scratch` holds (d_model + tokens) * kWidth + d_model elements.
void head_block(const DecoderModel& model, const Pass& pass, int64_t begin, const float* hidden, float* scratch,
                float* logits) {
    const int64_t rows = std::min<int64_t>(kWidth, model.vocab_size - begin), k = model.d_model;
    float *columns = scratch + k * kWidth, *widened = columns + pass.tokens * kWidth;
    std::fill_n(scratch, k * kWidth, 0.0f);
    for (int64_t r = 0; r < rows; ++r) {
        pass.math.to_float(model.format, model.head_row(begin + r), k, widened);
        for (int64_t i = 0; i < k; ++i) scratch[i * kWidth + r] = widened[i];
    }
    pass.math.product(kFloat32, hidden, k, pass.tokens, scratch, kWidth, k, columns, kWidth);
    for (int64_t t = 0; t < pass.tokens; ++t)
        std::memcpy(logits + t * model.vocab_size + begin, columns + t * kWidth, sizeof(float) * rows);
}

}  // namespace

void find_logits(const DecoderModel& model, const Pass& pass, const float* hidden, float* logits) {
    const int64_t k = model.d_model;
    const int threads = useful_threads(pass.threads, kDenseWorth * pass.tokens * model.vocab_size * k);
    if (pass.tokens >= kDenseTokens) {
        const int64_t each = (k + pass.tokens) * kWidth + k;
        const auto blocks = allocate<float>(threads * each);
        parallel_for(threads, (model.vocab_size + kWidth - 1) / kWidth, [&](int64_t task, int thread) {
            head_block(model, pass, task * kWidth, hidden, blocks.get() + thread * each, logits);
        });
        return;
    }
    by_head_rows(threads, model.vocab_size, [&](int64_t begin, int64_t apart, int64_t rows) {
        for (int64_t t = 0; t < pass.tokens; ++t)
            pass.math.dot_rows(model.format, model.head_row(begin), apart, k, rows, hidden + t * k,
                               logits + t * model.vocab_size + begin);
    });
}

}  // namespace fbitrain
