// bfloat16 in memory, and float32 parameters as a layer in bfloat16 sees them.
#pragma once

#include <cstdint>
#include <cstring>

namespace fbitrain {

// Static: files compiled for different instruction sets must not share a copy (kernels.h).

static inline float from_bfloat16(uint16_t pattern) {
    const uint32_t bits = uint32_t{pattern} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Round to nearest, ties to even; NaN stays NaN.
static inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : static_cast<uint16_t>(rounded);
}

static inline float rounded_to_bfloat16(float value) { return from_bfloat16(to_bfloat16(value)); }

}  // namespace fbitrain
