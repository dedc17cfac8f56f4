// dense_math.inl with AVX2, FMA and F16C.
#include <immintrin.h>

#include "dense_math.h"

namespace fbitrain {
namespace {

constexpr int kLanes = 8;

__m256 halves_to_floats(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

void floats_to_halves(__m256 v, uint16_t* p) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#include "dense_math.inl"

}  // namespace

const MathSet kMathAvx2 = kFunctions;

}  // namespace fbitrain
