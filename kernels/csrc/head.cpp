// The head of a decoder: logits of what the layers computed.
#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "threads.h"

namespace fbitrain {
namespace {

constexpr int64_t kHeadRows = 16;    // rows of the head per task and stream
constexpr int64_t kDenseTokens = 4;  // from here on a block of the head is widened to float32 once for all tokens

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

}  // namespace

void find_logits(const DecoderModel& model, const Pass& pass, const float* hidden, float* logits) {
    const int64_t k = model.d_model, row = k * bytes_of(model.format);
    const int threads = useful_threads(pass.threads, kDenseWorth * pass.tokens * model.vocab_size * k);
    if (pass.tokens >= kDenseTokens) {
        const int64_t each = (k + pass.tokens) * kWidth + k;
        const auto blocks = allocate<float>(threads * each);
        parallel_for(threads, (model.vocab_size + kWidth - 1) / kWidth, [&](int64_t task, int thread) {
            head_block(model, pass, task * kWidth, hidden, blocks.get() + thread * each, logits);
        });
        return;
    }
    const int64_t apart = model.vocab_size / kStreams, rest = apart * kStreams;
    const auto dot = [&](int64_t begin, int64_t stride, int64_t rows) {
        for (int64_t t = 0; t < pass.tokens; ++t)
            pass.math.dot_rows(model.format, static_cast<const char*>(model.head) + begin * row, stride, k, rows,
                               hidden + t * k, logits + t * model.vocab_size + begin);
    };
    parallel_for(threads, (apart + kHeadRows - 1) / kHeadRows, [&](int64_t task, int) {
        dot(task * kHeadRows, apart, std::min(kHeadRows, apart - task * kHeadRows));
    });
    dot(rest, 0, model.vocab_size - rest);
}

}  // namespace fbitrain
