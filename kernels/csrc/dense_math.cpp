// dense_math.inl for any CPU, and the choice between the sets.
#include "dense_math.h"

#include "kernels.h"

namespace fbitrain {
namespace {

constexpr int kLanes = 4;
typedef float Four __attribute__((vector_size(16)));

// Powers of two move the exponent from one bias to the other, which subnormals survive too.
float half_to_float(uint16_t half) {
    const uint32_t magnitude = uint32_t{half & 0x7FFFu} << 13, sign = uint32_t{half & 0x8000u} << 16;
    float value;
    __builtin_memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    if (magnitude >= 0x0F800000u) bits = magnitude | 0x70000000u;  // infinity and NaN
    bits |= sign;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

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
    return Four{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}

void floats_to_halves(Four v, uint16_t* p) {
    for (int lane = 0; lane < kLanes; ++lane) p[lane] = float_to_half(v[lane]);
}

#include "dense_math.inl"

}  // namespace

const MathSet kMathPortable = {rms_norm, swiglu, softmax, to_float, to_half, product, dot_rows};

const MathSet& math_set(int level) {
#if defined(FBITRAIN_DENSE_MATH_AVX2)
    if (level >= kLevelAvx2) return kMathAvx2;
#endif
    static_cast<void>(level);
    return kMathPortable;
}

}  // namespace fbitrain
