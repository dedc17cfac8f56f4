// Salient entries of a row. Included by each instruction set's file inside its own unnamed namespace, as pack.inl is.

#include "float16.inl"

void decode_values(const void* values, bool float16, int n, SalientEntries& entries) {
    if (float16)
        for (int i = 0; i < n; ++i) entries.value[i] = from_float16(static_cast<const uint16_t*>(values)[i]);
    else
        for (int i = 0; i < n; ++i) entries.value[i] = static_cast<float>(static_cast<const int8_t*>(values)[i]);
}

void salient_decode(const void* values, bool float16, const uint32_t* words, int n, SalientEntries& entries) {
    decode_values(values, float16, n, entries);
    for (int i = 0; i < n; ++i) {
        const int32_t column = entries.column[i];
        const auto bit = static_cast<int32_t>(words[column >> 5] >> (column & 31) & 1u);
        entries.sign[i] = static_cast<float>(2 * bit - 1);
    }
}

typedef float EightFloats __attribute__((vector_size(32)));

void salient_sums_of_eight(const SalientEntries& entries, int n, const float* x, float* values, float* signs) {
    EightFloats value_sum = {}, sign_sum = {};
    for (int i = 0; i < n; ++i) {
        EightFloats at_column;
        __builtin_memcpy(&at_column, x + int64_t{8} * entries.column[i], sizeof at_column);
        value_sum += entries.value[i] * at_column;
        sign_sum += entries.sign[i] * at_column;
    }
    __builtin_memcpy(values, &value_sum, sizeof value_sum);
    __builtin_memcpy(signs, &sign_sum, sizeof sign_sum);
}

void salient_sums(const SalientEntries& entries, int n, const float* x, int lanes, float* values, float* signs) {
    if (lanes == 8) return salient_sums_of_eight(entries, n, x, values, signs);
    EightFloats value_sum = {}, sign_sum = {};  // of every eighth entry
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        const int32_t* column = entries.column + i;
        const EightFloats at_column = {x[column[0]], x[column[1]], x[column[2]], x[column[3]],
                                       x[column[4]], x[column[5]], x[column[6]], x[column[7]]};
        EightFloats value8, sign8;
        __builtin_memcpy(&value8, entries.value + i, sizeof value8);
        __builtin_memcpy(&sign8, entries.sign + i, sizeof sign8);
        value_sum += value8 * at_column;
        sign_sum += sign8 * at_column;
    }
    values[0] = signs[0] = 0.0f;
    for (; i < n; ++i) {
        values[0] += entries.value[i] * x[entries.column[i]];
        signs[0] += entries.sign[i] * x[entries.column[i]];
    }
    for (int lane = 0; lane < 8; ++lane) {
        values[0] += value_sum[lane];
        signs[0] += sign_sum[lane];
    }
}
