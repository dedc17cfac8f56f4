// Calls the C functions of the decoder with random shapes and with wrong arguments; built with AddressSanitizer and UBSan by
// test_fuzz.py. Every array has exactly the size that decoder.h names, so that a step beyond it is found.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "decoder.h"

using namespace fbitrain;

extern "C" int fbitrain_supports(int level) noexcept;
extern "C" int64_t fbitrain_interleaved_bytes(int level, int64_t n, int64_t k) noexcept;
extern "C" int64_t fbitrain_interleave(int level, int threads, const void* words, void* out, int64_t n, int64_t k) noexcept;
extern "C" int64_t fbitrain_decoder_hidden(int level, int threads, int mode, const DecoderModel* model,
                                           const DecoderCache* cache, const int32_t* ids, int64_t first, int64_t tokens,
                                           int64_t wanted, float* hidden) noexcept;
extern "C" int64_t fbitrain_decoder_logits(int level, int threads, const DecoderModel* model, const float* hidden,
                                           int64_t tokens, float* logits) noexcept;
extern "C" int64_t fbitrain_screen_bytes(int64_t k) noexcept;
extern "C" int64_t fbitrain_screen_head(int level, int threads, const DecoderModel* model, uint8_t* codes,
                                        float* bounds) noexcept;
extern "C" int64_t fbitrain_decoder_likeliest(int level, int threads, const DecoderModel* model, const uint8_t* codes,
                                              const float* bounds, const float* hidden, int64_t* token) noexcept;

namespace {

std::mt19937 generator;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

// A random decoder that owns its arrays.
struct Random {
    std::vector<std::unique_ptr<char[]>> arrays;
    std::vector<std::unique_ptr<void, void (*)(void*)>> aligned;
    std::vector<LayerWeights> layers;
    DecoderModel model{};
    DecoderCache cache{};

    template <typename T>
    T* array(int64_t count, bool is_random = true) {
        arrays.emplace_back(new char[count * sizeof(T)]());
        auto* values = reinterpret_cast<T*>(arrays.back().get());
        // 1.0 or so in each of the formats' patterns would differ; small integers are tiny numbers in all of them.
        for (int64_t i = 0; is_random && i < count; ++i) values[i] = static_cast<T>(pick(1, 1000));
        return values;
    }

    float* floats(int64_t count) {
        auto* values = array<float>(count, false);
        for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(pick(-100, 100)) / 100.0f;
        return values;
    }

    // The bits in the order of the lowest level that has one, to the byte; null if none has.
    const uint32_t* interleaved(const uint32_t* words, int64_t n, int64_t k) {
        for (int level = 0; level < 4; ++level) {
            if (fbitrain_supports(level) != 1) continue;
            const int64_t bytes = fbitrain_interleaved_bytes(level, n, k);
            check(bytes >= 0, "the size of interleaved bits was refused");
            if (bytes == 0) continue;
            aligned.emplace_back(std::aligned_alloc(64, static_cast<size_t>(bytes)), std::free);
            void* bits = aligned.back().get();
            check(fbitrain_interleave(level, 2, words, bits, n, k) == kOk, "interleaving was refused");
            check(fbitrain_interleave(level, 2, words, static_cast<char*>(bits) + 4, n, k) == kBadArgument, "unaligned");
            return static_cast<const uint32_t*>(bits);
        }
        return nullptr;
    }

    BinaryWeight weight(int64_t n, int64_t k) {
        const int64_t scales[] = {k, n, 1, n * (k / model.group_size)}, count = scales[model.scale];
        const auto* words = array<uint32_t>(n * ((k + 31) / 32));
        const auto* alpha = floats(count);
        const auto* beta = model.scale == 3 || pick(0, 1) ? nullptr : floats(count);
        return {words, alpha, beta, pick(0, 1) ? interleaved(words, n, k) : nullptr};
    }

    Random() {
        model.scale = static_cast<int32_t>(pick(0, 3));
        model.group_size = 32;
        const int64_t step = model.scale == 3 ? 32 : 1;
        model.n_kv_heads = pick(1, 3);
        model.n_heads = model.n_kv_heads * pick(1, 2);
        model.head_size = model.scale == 3 ? 32 : 2 * pick(1, 20);
        model.d_model = step * pick(1, 3) + (step == 1 ? pick(0, 60) : 0);
        model.d_ff = step * pick(1, 4) + (step == 1 ? pick(0, 90) : 0);
        model.n_layers = pick(1, 2);
        model.vocab_size = pick(1, 80);
        model.format = static_cast<int32_t>(pick(0, 2));
        model.epsilon = 1e-5f;
        for (int64_t i = 0; i < model.n_layers; ++i)
            layers.push_back({weight(model.width(), model.d_model), weight(model.kv_width(), model.d_model),
                              weight(model.kv_width(), model.d_model), weight(model.d_model, model.width()),
                              weight(model.d_ff, model.d_model), weight(model.d_ff, model.d_model),
                              weight(model.d_model, model.d_ff), floats(model.d_model), floats(model.d_model)});
        model.layers = layers.data();
        const int64_t embedding = model.vocab_size * model.d_model;
        if (model.format == kFloat32) {
            model.embedding = floats(embedding);
            model.head = floats(embedding);
        } else {
            model.embedding = array<uint16_t>(embedding);
            model.head = array<uint16_t>(embedding);
        }
        model.final_norm = floats(model.d_model);
        model.frequencies = floats(model.head_size / 2);
        cache.capacity = 32 * pick(1, 9);
        cache.format = pick(0, 1) ? kFloat16 : kFloat32;
        const int64_t positions = model.n_layers * model.n_kv_heads * cache.capacity * bytes_of(cache.format);
        cache.keys = array<char>(positions * model.head_size, false);
        cache.values = array<char>(positions * ((model.head_size + 31) / 32 * 32), false);
    }
};

// A screen of a model's head, in arrays of its own, and what it finds.
struct Screen {
    std::unique_ptr<uint8_t, void (*)(void*)> codes;
    std::vector<float> bounds;

    Screen(int level, int threads, const DecoderModel& model)
        : codes(nullptr, std::free), bounds(3 * model.vocab_size) {
        const auto bytes = static_cast<size_t>(model.vocab_size * fbitrain_screen_bytes(model.d_model));
        codes.reset(static_cast<uint8_t*>(std::aligned_alloc(32, bytes)));
        check(fbitrain_screen_head(level, threads, &model, codes.get(), bounds.data()) == kOk, "screen_head refused");
        check(fbitrain_screen_head(level, threads, &model, codes.get() + 1, bounds.data()) == kBadArgument, "unaligned");
    }

    void compare(int level, int threads, const DecoderModel& model, const float* hidden, const float* logits) const {
        int64_t token = -1, expected = 0;
        check(fbitrain_decoder_likeliest(level, threads, &model, codes.get(), bounds.data(), hidden, &token) == kOk,
              "decoder_likeliest refused valid arguments");
        for (int64_t i = 1; i < model.vocab_size; ++i)
            if (logits[i] > logits[expected]) expected = i;
        check(token == expected, "decoder_likeliest found another token");
        check(fbitrain_decoder_likeliest(level, threads, &model, codes.get(), bounds.data(), nullptr, &token) ==
                  kBadArgument, "no hidden");
    }
};

void valid() {
    Random random;
    const DecoderModel& model = random.model;
    const int64_t total = pick(1, random.cache.capacity);
    std::unique_ptr<int32_t[]> ids(new int32_t[total]);
    for (int64_t i = 0; i < total; ++i) ids[i] = static_cast<int32_t>(pick(0, model.vocab_size - 1));
    for (int level = 0; level < 4; ++level) {
        if (fbitrain_supports(level) != 1) continue;
        const int threads = static_cast<int>(pick(1, 3)), mode = static_cast<int>(pick(0, 1));
        const Screen screen(level, threads, model);
        for (int64_t first = 0; first < total;) {
            const int64_t count = pick(1, total - first);
            std::unique_ptr<int32_t[]> some(new int32_t[count]);
            std::copy(ids.get() + first, ids.get() + first + count, some.get());
            const int64_t wanted = pick(0, count);
            std::unique_ptr<float[]> hidden(new float[wanted * model.d_model]);
            std::unique_ptr<float[]> logits(new float[wanted * model.vocab_size]);
            check(fbitrain_decoder_hidden(level, threads, mode, &model, &random.cache, some.get(), first, count, wanted,
                                          hidden.get()) == 0,
                  "decoder_hidden refused valid arguments");
            check(fbitrain_decoder_logits(level, threads, &model, hidden.get(), wanted, logits.get()) == 0,
                  "decoder_logits refused valid arguments");
            for (int64_t i = 0; i < wanted * model.vocab_size; ++i) check(std::isfinite(logits[i]), "logits not finite");
            if (wanted == 1) screen.compare(level, threads, model, hidden.get(), logits.get());
            first += count;
        }
    }
}

void refused() {
    Random random;
    DecoderModel model = random.model;
    DecoderCache cache = random.cache;
    int32_t id = 0;
    int64_t first = 0, tokens = 1;
    std::unique_ptr<float[]> hidden(new float[model.d_model]);
    int64_t wanted = 1;
    switch (pick(0, 10)) {
        case 0: model.layers = nullptr; break;
        case 1: model.head_size += 1; break;
        case 2: model.n_layers = -pick(0, 9); break;
        case 3: model.vocab_size = int64_t{1} << 62; break;
        case 4: model.format = 7; break;
        case 5: cache.capacity += 1; break;
        case 6: cache.keys = nullptr; break;
        case 7: id = static_cast<int32_t>(pick(0, 1) ? -1 : model.vocab_size); break;
        case 8: first = pick(0, 1) ? cache.capacity : -1; break;
        case 9: tokens = pick(0, 1) ? cache.capacity + 1 : -1; break;
        case 10: wanted = pick(0, 1) ? 2 : -1; break;
    }
    check(fbitrain_decoder_hidden(0, 1, 0, &model, &cache, &id, first, tokens, wanted, hidden.get()) == -1,
          "decoder_hidden took wrong arguments");
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
    for (int round = 0; round < rounds; ++round) {
        generator.seed(static_cast<unsigned>(round));
        valid();
        refused();
    }
    check(fbitrain_decoder_hidden(0, 1, 0, nullptr, nullptr, nullptr, 0, 1, 1, nullptr) == -1, "null model taken");
    check(fbitrain_decoder_logits(0, 1, nullptr, nullptr, 1, nullptr) == -1, "null model taken");
    check(fbitrain_screen_bytes(0) == 0 && fbitrain_screen_bytes(int64_t{1} << 40) == 0, "no head has such a screen");
    check(fbitrain_screen_head(0, 1, nullptr, nullptr, nullptr) == kBadArgument, "null model taken");
    check(fbitrain_interleaved_bytes(9, 1, 1) == kNoLevel, "no such level");
    check(fbitrain_interleaved_bytes(0, -1, 1) == kBadArgument, "less than no rows");
    check(fbitrain_interleave(0, 1, nullptr, nullptr, 1, 1) == kBadArgument, "a level without an order of its own");
    std::printf("%d rounds\n", rounds);
}
