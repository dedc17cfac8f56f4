// The token with the largest logit, found without computing all logits: each row of the head is kept a second time in 6
// bits a weight, with bounds of what that leaves out, and only rows whose logit could be the largest are read in full.
#pragma once

#include "decoder.h"

namespace fbitrain {

constexpr int kCodeZero = 32;  // the code of 0: a code less this, times the row's scale, is the weight but for rounding
constexpr int64_t kMaxScreened = int64_t{1} << 17;  // columns: 63 * 127 * as many fit in int32

inline int64_t code_blocks(int64_t k) { return (k + kCodeColumns - 1) / kCodeColumns; }

// A head of vocab_size rows w = scale * code + rest.
struct HeadScreen {
    const uint8_t* codes;  // [vocab_size][code_blocks][kCodeBytes]
    const float* scales;  // [vocab_size]
    const float* kept;  // [vocab_size], at least |scale * code|, Euclidean norms
    const float* lost;  // [vocab_size], at least |rest|
};

// Makes the screen of a model's head, into arrays of these sizes.
void make_screen(const DecoderModel& model, const Pass& pass, uint8_t* codes, float* scales, float* kept, float* lost);

// The first token of the largest logit of hidden [d_model]; NaN counts as largest, as in torch.argmax. The logits
// compared are those of find_logits for one token, to the bit. Throws std::bad_alloc.
int64_t find_likeliest(const DecoderModel& model, const Pass& pass, const KernelSet& set, const HeadScreen& screen,
                       const float* hidden);

}  // namespace fbitrain
