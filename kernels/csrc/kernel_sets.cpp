// The levels that were compiled, each with what it takes from the levels below it.
#include "kernels.h"

namespace fbitrain {
namespace {

struct Levels {
    KernelSet sets[kLevels];
    bool compiled[kLevels] = {true, false, false, false};

    Levels() {
        sets[kLevelPortable] = kPortable;
#if defined(FBITRAIN_AVX2)
        add(kLevelAvx2, kAvx2);
#endif
#if defined(FBITRAIN_AVX512)
        add(kLevelAvx512, kAvx512);
#endif
#if defined(FBITRAIN_AMX)
        add(kLevelAmx, kAmx);
#endif
    }

    void add(int level, KernelSet set) {
        int below_level = level - 1;
        while (!compiled[below_level]) --below_level;
        const KernelSet& below = sets[below_level];
        if (!set.transpose) set.transpose = below.transpose;
        if (!set.int8_block) set.int8_block = below.int8_block;
        if (!set.int8_rows) {
            set.chunk_words = below.chunk_words;
            set.int8_rows = below.int8_rows;
        }
        if (!set.float_block) {
            set.floats_per_word = below.floats_per_word;
            set.float_tables = below.float_tables;
            set.float_block = below.float_block;
        }
        if (!set.xnor_block) set.xnor_block = below.xnor_block;
        if (!set.salient_decode) set.salient_decode = below.salient_decode;
        if (!set.salient_sums) set.salient_sums = below.salient_sums;
        if (!set.pack_row) set.pack_row = below.pack_row;
        if (!set.unpack_row) set.unpack_row = below.unpack_row;
        if (!set.activations.quantize) set.activations = below.activations;
        if (!set.screen_dots) set.screen_dots = below.screen_dots;
        sets[level] = set;
        compiled[level] = true;
    }
};

const Levels& levels() {
    static const Levels all;
    return all;
}

bool is_compiled(int level) { return level >= 0 && level < kLevels && levels().compiled[level]; }

}  // namespace

const KernelSet* kernel_set(int level) {
    return is_compiled(level) && level <= highest_level() ? &levels().sets[level] : nullptr;
}

}  // namespace fbitrain

// 1: this CPU, under this operating system, runs the level; 0: it does not; -1: the compiler could not build it.
extern "C" FBITRAIN_EXPORT int fbitrain_supports(int level) noexcept {
    return !fbitrain::is_compiled(level) ? -1 : level <= fbitrain::highest_level();
}
