// A float16 as a float. Included by each instruction set's files inside their own unnamed namespaces, as pack.inl is.

// Through integers alone, so that the compiler makes vectors of it; subnormal numbers are scaled like all others.
float from_float16(uint16_t half) {
    const uint32_t magnitude = uint32_t{half & 0x7FFFu} << 13, special = (half & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
    float value;
    __builtin_memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;  // the difference of the exponents' biases
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    bits |= special | uint32_t{half & 0x8000u} << 16;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
