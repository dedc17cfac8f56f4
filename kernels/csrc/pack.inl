// Signs of floats to bits and back, a row at a time. Included by each instruction set's file inside its own unnamed
// namespace, so that the compiler vectorizes it with that set's instructions and no copy is shared.
//
// A float is told apart by its bit pattern: its sign is +1 if it is >= 0, -0.0 included, and -1 for NaN, as in
// reference.py.

enum Format { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

// `infinity` is the largest pattern that is >= 0 and no NaN; `minus_zero` is the sign bit alone.
template <typename Pattern>
void pack_patterns(const Pattern* w, int64_t k, Pattern infinity, Pattern minus_zero, uint32_t* words) {
    const auto bit = [=](Pattern p) { return static_cast<uint32_t>((p <= infinity) | (p == minus_zero)); };
    const int64_t whole = k / 32;
    for (int64_t i = 0; i < whole; ++i) {
        uint32_t word = 0;
        for (int j = 0; j < 32; ++j) word |= bit(w[32 * i + j]) << j;
        words[i] = word;
    }
    if (k % 32) {
        uint32_t word = 0;
        for (int j = 0; j < k % 32; ++j) word |= bit(w[32 * whole + j]) << j;
        words[whole] = word;
    }
}

template <typename Pattern>
void unpack_patterns(const uint32_t* words, int64_t k, Pattern one, Pattern minus_zero, Pattern* out) {
    const int64_t whole = k / 32;
    for (int64_t i = 0; i < whole; ++i)
        for (int j = 0; j < 32; ++j)
            out[32 * i + j] = static_cast<Pattern>((words[i] & (1u << j)) ? one : (one | minus_zero));
    for (int j = 0; j < k % 32; ++j)
        out[32 * whole + j] = static_cast<Pattern>((words[whole] & (1u << j)) ? one : (one | minus_zero));
}

void pack_row(int format, const void* w, int64_t k, uint32_t* words) {
    switch (format) {
        case kFloat32:
            return pack_patterns<uint32_t>(static_cast<const uint32_t*>(w), k, 0x7F800000u, 0x80000000u, words);
        case kBfloat16:
            return pack_patterns<uint16_t>(static_cast<const uint16_t*>(w), k, 0x7F80, 0x8000, words);
        case kFloat16:
            return pack_patterns<uint16_t>(static_cast<const uint16_t*>(w), k, 0x7C00, 0x8000, words);
        default:
            return pack_patterns<uint64_t>(static_cast<const uint64_t*>(w), k, 0x7FF0000000000000u, 0x8000000000000000u,
                                           words);
    }
}

void unpack_row(int format, const uint32_t* words, int64_t k, void* out) {
    switch (format) {
        case kFloat32:
            return unpack_patterns<uint32_t>(words, k, 0x3F800000u, 0x80000000u, static_cast<uint32_t*>(out));
        case kBfloat16:
            return unpack_patterns<uint16_t>(words, k, 0x3F80, 0x8000, static_cast<uint16_t*>(out));
        case kFloat16:
            return unpack_patterns<uint16_t>(words, k, 0x3C00, 0x8000, static_cast<uint16_t*>(out));
        default:
            return unpack_patterns<uint64_t>(words, k, 0x3FF0000000000000u, 0x8000000000000000u,
                                             static_cast<uint64_t*>(out));
    }
}
