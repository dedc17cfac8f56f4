// dense_math.inl with AVX-512.
#include <immintrin.h>

#include "dense_math.h"

namespace fbitrain {
namespace {

constexpr int kLanes = 16;

__m512 halves_to_floats(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

void floats_to_halves(__m512 v, uint16_t* p) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

#include "dense_math.inl"

}  // namespace

const MathSet kMathAvx512 = kFunctions;

}  // namespace fbitrain
