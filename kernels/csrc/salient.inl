// Sums over the salient entries of a row. Included by each instruction set's file inside its own unnamed namespace, as
// pack.inl is.

typedef float EightFloats __attribute__((vector_size(32)));

// Eight tokens side by side.
void salient_sums_of_eight(const int32_t* column, const float* value, const float* sign, int n, const float* x,
                           float* values, float* signs) {
    EightFloats value_sum = {}, sign_sum = {};
    for (int i = 0; i < n; ++i) {
        EightFloats at_column;
        __builtin_memcpy(&at_column, x + int64_t{8} * column[i], sizeof at_column);
        value_sum += value[i] * at_column;
        sign_sum += sign[i] * at_column;
    }
    __builtin_memcpy(values, &value_sum, sizeof value_sum);
    __builtin_memcpy(signs, &sign_sum, sizeof sign_sum);
}

void salient_sums(const int32_t* column, const float* value, const float* sign, int n, const float* x, int lanes,
                  float* values, float* signs) {
    if (lanes == 8) return salient_sums_of_eight(column, value, sign, n, x, values, signs);
    EightFloats value_sum = {}, sign_sum = {};  // of every eighth entry
    int i = 0;
    for (; i + 8 <= n; i += 8) {
        EightFloats at_column, value8, sign8;
        for (int lane = 0; lane < 8; ++lane) at_column[lane] = x[column[i + lane]];
        __builtin_memcpy(&value8, value + i, sizeof value8);
        __builtin_memcpy(&sign8, sign + i, sizeof sign8);
        value_sum += value8 * at_column;
        sign_sum += sign8 * at_column;
    }
    values[0] = signs[0] = 0.0f;
    for (; i < n; ++i) {
        values[0] += value[i] * x[column[i]];
        signs[0] += sign[i] * x[column[i]];
    }
    for (int lane = 0; lane < 8; ++lane) {
        values[0] += value_sum[lane];
        signs[0] += sign_sum[lane];
    }
}
