// A screened head. With w = s c + e and x = t q + f, where c and q are integers,
//
//     <w, x> = s t <c, q> + <s c, f> + <e, x>,    |<s c, f>| <= |s c| |f|,    |<e, x>| <= |e| |x|  (Cauchy and Schwarz)
//
// so integers bound every logit from above. Rows whose bound is below some row's logit cannot have the largest.
#include "head_screen.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "threads.h"

namespace fbitrain {
namespace {

constexpr float kMostCode = 31.0f, kMostInt8 = 127.0f;
constexpr int64_t kScreenWorth = 6;  // binary weights that take as long to read as one weight of a screen
// Of max |x|. Below it, products of floats leave the range where rounding is relative.
constexpr float kLeastScreened = 1e-20f;
constexpr float kSafeSum = FLT_MAX / 4;  // sums that stay below in magnitude do not overflow by being rounded
constexpr float kUpwards = 1.0f + 4 * FLT_EPSILON;  // makes a norm rounded to float an upper bound

// The integer next to a |value| < 2^22; the compiler makes vectors of it, as it does not of lrintf.
int32_t nearest(float value) {
    const float shifted = value + 12582912.0f;  // 1.5 * 2^23
    int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4B400000;
}

float largest_magnitude(const float* values, int64_t n) {
    float largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(values[i]));
    return largest;
}

// As torch.argmax: the first of the largest, and NaN is larger than all.
int64_t first_largest(const float* values, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n && values[best] == values[best]; ++i)
        if (!(values[i] <= values[best])) best = i;
    return best;
}

// One row of a head: `w` [k], filled up with zeros to whole blocks.
struct RowOfScreen {
    float scale, kept, lost;

    RowOfScreen(const float* w, int64_t k, uint8_t* codes) {
        const float largest = largest_magnitude(w, k), step = kMostCode / largest, columns = static_cast<float>(k);
        if (!(step < FLT_MAX)) {  // all zeros, or so small that they may as well be: codes of no worth
            std::fill_n(codes, code_blocks(k) * kCodeBytes, uint8_t{0});
            scale = kept = 0;
            lost = largest * std::sqrt(columns) * kUpwards;
            for (int64_t i = 0; i < k; ++i) lost += w[i] - w[i];  // NaN, if w holds one
            return;
        }
        scale = largest / kMostCode;
        Squares squares;
        for (int64_t begin = 0; begin < k; begin += kCodeColumns, codes += kCodeBytes)
            encode(w + begin, step, codes, squares);
        // In units of the scale; NaN or infinite as the row is. A rest is rounded as its code's product with the scale
        // is.
        const float roundings = 8 * kMostCode * FLT_EPSILON * std::sqrt(columns),
                    upwards = 1.0f + columns * FLT_EPSILON;
        kept = scale * std::sqrt(static_cast<float>(squares.codes)) * kUpwards;
        lost = scale * (std::sqrt(squares.rests()) * upwards + roundings) * kUpwards;
    }

private:
    static constexpr int kLanes = 16;  // sums side by side, which the compiler makes vectors of

    struct Squares {
        int64_t codes = 0;
        float rest[kLanes] = {};
        float rests() const {
            float sum = 0;
            for (float each : rest) sum += each;
            return sum;
        }
    };

    static void encode(const float* w, float step, uint8_t* codes, Squares& squares) {
        uint8_t code[kCodeColumns];
        int32_t sum = 0;
        for (int begin = 0; begin < kCodeColumns; begin += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) {
                const float value = w[begin + lane] * step;
                const int32_t c = ((nearest(value) + kCodeZero) & 63) - kCodeZero;  // within six bits if w is NaN, too
                const float rest = value - static_cast<float>(c);
                sum += c * c;
                squares.rest[lane] += rest * rest;
                code[begin + lane] = static_cast<uint8_t>(c + kCodeZero);
            }
        squares.codes += sum;
        for (int m = 0; m < 3; ++m)
            for (int j = 0; j < 32; ++j)
                codes[32 * m + j] = static_cast<uint8_t>(code[32 * m + j] | (code[96 + j] >> 2 * m & 3) << 6);
    }
};

// x in integers, and what that leaves out.
struct ScreenedInput {
    Buffer<int8_t> q;  // [blocks * kCodeColumns]
    float scale, norm, lost;
    int32_t offset = 0;  // what kCodeZero adds to a sum with codes

    ScreenedInput(const float* x, int64_t k) : q(allocate<int8_t>(code_blocks(k) * kCodeColumns)) {
        scale = largest_magnitude(x, k) / kMostInt8;
        const float step = 1.0f / scale;
        double squares = 0, lost_squares = 0;
        std::fill_n(q.get(), code_blocks(k) * kCodeColumns, int8_t{0});
        for (int64_t i = 0; i < k; ++i) {
            const int32_t value = std::clamp(nearest(x[i] * step), -127, 127);
            const double rest = x[i] - double{scale} * value;
            squares += double{x[i]} * x[i];
            lost_squares += rest * rest;
            q[i] = static_cast<int8_t>(value);
            offset += kCodeZero * value;
        }
        norm = static_cast<float>(std::sqrt(squares)) * kUpwards;
        lost = static_cast<float>(std::sqrt(lost_squares)) * kUpwards;
    }

    // Whether bounds say anything: not of NaN and infinity, which the norm then is, and not of next to nothing.
    bool is_usable() const { return scale * kMostInt8 >= kLeastScreened && std::isfinite(norm); }
};

// Of one token, in steps.
class Screening {
public:
    Screening(const DecoderModel& model, const Pass& pass, const KernelSet& set, const HeadScreen& screen,
              const float* hidden, const ScreenedInput& x)
        : model_(model), pass_(pass), set_(set), screen_(screen), hidden_(hidden), x_(x),
          estimates_(allocate<float>(model.vocab_size)) {}

    int64_t run() {
        estimate();
        return likeliest_of(could_reach(logit(first_largest(estimates_.get(), model_.vocab_size))));
    }

private:
    int threads(int64_t worth, int64_t rows) const {
        return useful_threads(pass_.threads, worth * rows * model_.d_model);
    }

    // estimates_ = logits by integers alone.
    void estimate() {
        const int64_t blocks = code_blocks(model_.d_model);
        const auto estimate_rows = [&](int64_t begin, int64_t apart, int64_t rows) {
            int32_t sums[kStreams * kHeadRows];
            set_.screen_dots(screen_.codes + begin * blocks * kCodeBytes, apart, blocks, rows, x_.q.get(), sums);
            for (int64_t s = 0; s < (apart ? kStreams : 1); ++s)
                for (int64_t r = 0; r < rows; ++r) {
                    const int64_t row = begin + s * apart + r;
                    estimates_[row] =
                        screen_.scales[row] * x_.scale * static_cast<float>(sums[s * rows + r] - x_.offset);
                }
        };
        by_head_rows(threads(kScreenWorth, model_.vocab_size), model_.vocab_size, estimate_rows);
    }

    // The rows whose logit may be `least` or more, ascending. One that holds NaN or infinity may, and one whose sums
    // might overflow.
    std::vector<int64_t> could_reach(float least) const {
        constexpr int64_t kTogether = 64;
        // A logit's k products and sums of floats round by less than this, relative to |w| |x|, and so does the
        // estimate.
        const float rounding = static_cast<float>(model_.d_model + 64) * FLT_EPSILON;
        const float per_kept = x_.lost + rounding * x_.norm, per_lost = (1.0f + rounding) * x_.norm;
        const float bound = least - static_cast<float>(model_.d_model) * FLT_MIN;  // products may be denormal, too
        const auto may = [&](int64_t row) {
            const float kept = screen_.kept[row], lost = screen_.lost[row];
            return !(estimates_[row] + kept * per_kept + lost * per_lost < bound) |
                   !((kept + lost) * x_.norm < kSafeSum);
        };
        std::vector<int64_t> rows;
        for (int64_t begin = 0; begin < model_.vocab_size; begin += kTogether) {
            const int64_t end = std::min(begin + kTogether, model_.vocab_size);
            int found = 0;
            for (int64_t row = begin; row < end; ++row) found += may(row);
            for (int64_t row = begin; found && row < end; ++row)
                if (may(row)) rows.push_back(row);
        }
        return rows;
    }

    int64_t likeliest_of(const std::vector<int64_t>& rows) const {
        const auto count = static_cast<int64_t>(rows.size());
        std::vector<float> logits(rows.size());
        parallel_for(threads(kDenseWorth, count), count, [&](int64_t i, int) { logits[i] = logit(rows[i]); });
        return rows[first_largest(logits.data(), count)];
    }

    float logit(int64_t row) const {
        float found;
        pass_.math.dot_rows(model_.format, model_.head_row(row), 0, model_.d_model, 1, hidden_, &found);
        return found;
    }

    const DecoderModel& model_;
    const Pass& pass_;
    const KernelSet& set_;
    const HeadScreen& screen_;
    const float* hidden_;
    const ScreenedInput& x_;
    const Buffer<float> estimates_;
};

}  // namespace

void make_screen(const DecoderModel& model, const Pass& pass, uint8_t* codes, float* scales, float* kept, float* lost) {
    const int64_t k = model.d_model, blocks = code_blocks(k), padded = blocks * kCodeColumns;
    const auto rows = allocate<float>(pass.threads * padded);
    std::fill_n(rows.get(), pass.threads * padded, 0.0f);
    parallel_for(pass.threads, model.vocab_size, [&](int64_t row, int thread) {
        float* w = rows.get() + thread * padded;
        pass.math.to_float(model.format, model.head_row(row), k, w);
        const RowOfScreen made(w, k, codes + row * blocks * kCodeBytes);
        scales[row] = made.scale, kept[row] = made.kept, lost[row] = made.lost;
    });
}

int64_t find_likeliest(const DecoderModel& model, const Pass& pass, const KernelSet& set, const HeadScreen& screen,
                       const float* hidden) {
    const ScreenedInput x(hidden, model.d_model);
    if (x.is_usable()) return Screening(model, pass, set, screen, hidden, x).run();
    const auto logits = allocate<float>(model.vocab_size);
    find_logits(model, pass, hidden, logits.get());
    return first_largest(logits.get(), model.vocab_size);
}

}  // namespace fbitrain
