// dense_math.inl for any CPU, and the choice between the sets.
#include "dense_math.h"

#include "kernels.h"

namespace fbitrain {
namespace {

constexpr int kLanes = 4;
typedef float Four __attribute__((vector_size(16)));

#include "float16.inl"

// Round to nearest, ties to even; too large becomes infinity, NaN stays NaN.
uint16_t float_to_half(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7FFFFFFFu;
    if (bits > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
    if (bits >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
    if (bits < 0x38800000u) {  // subnormal: adding 1/2 makes the unit of the last place 2^-24
        float small;
        __builtin_memcpy(&small, &bits, sizeof small);
        small += 0.5f;
        __builtin_memcpy(&bits, &small, sizeof bits);
        return static_cast<uint16_t>(sign | (bits - 0x3F000000u));
    }
    return static_cast<uint16_t>(sign | (((bits + 0xFFFu + (bits >> 13 & 1u)) >> 13) - 0x1C000u));
}

Four halves_to_floats(const uint16_t* p) {
    return Four{from_float16(p[0]), from_float16(p[1]), from_float16(p[2]), from_float16(p[3])};
}

void floats_to_halves(Four v, uint16_t* p) {
    for (int lane = 0; lane < kLanes; ++lane) p[lane] = float_to_half(v[lane]);
}

#include "dense_math.inl"

}  // namespace

const MathSet kMathPortable = kFunctions;

const MathSet& math_set(int level) {
#if defined(FBITRAIN_DENSE_MATH_AVX512)
    if (level >= kLevelAvx512) return kMathAvx512;
#endif
#if defined(FBITRAIN_DENSE_MATH_AVX2)
    if (level >= kLevelAvx2) return kMathAvx2;
#endif
    static_cast<void>(level);
    return kMathPortable;
}

}  // namespace fbitrain
