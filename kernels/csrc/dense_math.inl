// The functions of a MathSet, written once for registers of any width. The file that includes this has defined kLanes,
// halves_to_floats and floats_to_halves, in an unnamed namespace. Vectors are GCC's and Clang's own, so the same lines
// become SSE2, NEON or AVX.

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

template <typename To, typename From>
To same_bits(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "");
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// A difference, because x - 0 is x even where 0 + x is not (-0), so that nothing is left to compute.
Floats all(float value) { return value - Floats{}; }

Floats load(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

struct Half {
    uint16_t bits;
};
struct Brain {  // bfloat16
    uint16_t bits;
};

Floats load(const Half* p) { return halves_to_floats(&p->bits); }

Floats load(const Brain* p) {
    typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
    Shorts v;
    __builtin_memcpy(&v, p, sizeof v);
    return same_bits<Floats>(__builtin_convertvector(v, Ints) << 16);
}

float one(const float* p) { return *p; }
float one(const Brain* p) { return same_bits<float>(uint32_t{p->bits} << 16); }
float one(const Half* p) {
    uint16_t padded[kLanes] = {p->bits};
    return halves_to_floats(padded)[0];
}

void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

float sum_lanes(Floats v) {
    float lanes[kLanes];
    store(lanes, v);
    for (int half = kLanes / 2; half; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

Floats select(Ints condition, Floats yes, Floats no) {
    return same_bits<Floats>((condition & same_bits<Ints>(yes)) | (~condition & same_bits<Ints>(no)));
}

// e^x to 2 units in the last place, for x clamped to what float32 can hold; NaN stays NaN. x = n ln 2 + r with
// |r| <= ln 2 / 2; the polynomial is Taylor's of e^r, whose next term is below 2^-26.
Floats exp_of(Floats x) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: its last bit is worth 1, so adding it rounds to an integer
    x = select(x < all(-87.0f), all(-87.0f), x);
    x = select(x > all(88.0f), all(88.0f), x);
    const Floats shifted = x * all(1.44269504f) + all(kRound);
    const Floats n = shifted - all(kRound);
    const Floats r = (x - n * all(0.693359375f)) - n * all(-2.12194440e-4f);  // ln 2 in two parts, the first exact
    constexpr float kTaylor[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    Floats sum = all(1.0f / 5040);
    for (float coefficient : kTaylor) sum = sum * r + all(coefficient);
    const Ints exponent = (same_bits<Ints>(shifted) << 23) + same_bits<Ints>(all(1.0f));
    return sum * same_bits<Floats>(exponent);
}

// Calls body(i, vector of p[i ..]) for all of p [n]; the last vector is filled up with `fill` and cut when stored.
template <typename Body>
void update(float* p, int64_t n, float fill, const Body& body) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(p + i, body(i, load(p + i)));
    if (i == n) return;
    float last[kLanes];
    for (float& value : last) value = fill;
    __builtin_memcpy(last, p + i, sizeof(float) * (n - i));
    store(last, body(i, load(last)));
    __builtin_memcpy(p + i, last, sizeof(float) * (n - i));
}

// p[0 .. kLanes), zeros from `n` on.
Floats load_up_to(const float* p, int64_t n) {
    if (n >= kLanes) return load(p);
    float padded[kLanes] = {};
    __builtin_memcpy(padded, p, sizeof(float) * n);
    return load(padded);
}

void rms_norm(const float* x, const float* weight, float epsilon, int64_t n, float* y) {
    Floats squares = {};
    for (int64_t i = 0; i < n; i += kLanes) {
        const Floats v = load_up_to(x + i, n - i);
        squares += v * v;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum_lanes(squares) / static_cast<float>(n) + epsilon);
    for (int64_t i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * factor);
}

void swiglu(const float* up, int64_t n, float* gate) {
    update(gate, n, 0.0f,
           [&](int64_t i, Floats g) { return g / (all(1.0f) + exp_of(-g)) * load_up_to(up + i, n - i); });
}

float powers(float* scores, int64_t n, float factor) {
    Floats largest = all(scores[0]);
    const Floats factors = all(factor);
    update(scores, n, scores[0], [&](int64_t, Floats v) {
        largest = select(v > largest, v, largest);
        return v;
    });
    float top = largest[0];
    for (int lane = 1; lane < kLanes; ++lane) top = largest[lane] > top ? largest[lane] : top;
    Floats sums = {};
    update(scores, n, -__builtin_inff(), [&](int64_t i, Floats v) {
        Floats power = exp_of((v - all(top)) * factors);
        if (i + kLanes > n)
            for (int64_t lane = n - i; lane < kLanes; ++lane) power[lane] = 0.0f;
        sums += power;
        return power;
    });
    return sum_lanes(sums);
}

template <typename From>
void to_float_from(const void* from, int64_t n, float* to) {
    const auto* p = static_cast<const From*>(from);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(p + i));
    for (; i < n; ++i) to[i] = one(p + i);
}

void to_float(int format, const void* from, int64_t n, float* to) {
    if (format == kFloat32) return to_float_from<float>(from, n, to);
    return format == kFloat16 ? to_float_from<Half>(from, n, to) : to_float_from<Brain>(from, n, to);
}

void to_half(const float* from, int64_t n, uint16_t* to) {
    for (int64_t i = 0; i < n; i += kLanes) {
        uint16_t halves[kLanes];
        floats_to_halves(load_up_to(from + i, n - i), halves);
        __builtin_memcpy(to + i, halves, sizeof(uint16_t) * (n - i < kLanes ? n - i : kLanes));
    }
}

constexpr int kTileTokens = 6;  // times 2 registers of sums: as many as 16 registers hold beside their operands

template <int kTokens, typename B>
void product_tile(const float* a, ptrdiff_t a_stride, const B* b, ptrdiff_t b_stride, int64_t k, float* c,
                  ptrdiff_t c_stride) {
    constexpr int kVectors = kTokens == 1 && 4 * kLanes <= kWidth ? 4 : 2;
    for (int column = 0; column < kWidth; column += kVectors * kLanes) {
        Floats sum[kTokens][kVectors] = {};
        for (int64_t i = 0; i < k; ++i) {
            Floats row[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) row[v] = load(b + i * b_stride + column + v * kLanes);
#pragma GCC unroll 6
            for (int t = 0; t < kTokens; ++t) {
                const Floats factor = all(a[t * a_stride + i]);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sum[t][v] += factor * row[v];
            }
        }
#pragma GCC unroll 6
        for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) store(c + t * c_stride + column + v * kLanes, sum[t][v]);
    }
}

template <typename B>
void product_from(const float* a, ptrdiff_t a_stride, int64_t tokens, const void* b, ptrdiff_t b_stride, int64_t k,
                  float* c, ptrdiff_t c_stride) {
    constexpr decltype(&product_tile<1, B>) tiles[] = {nullptr,
                                                       product_tile<1, B>,
                                                       product_tile<2, B>,
                                                       product_tile<3, B>,
                                                       product_tile<4, B>,
                                                       product_tile<5, B>,
                                                       product_tile<6, B>};
    for (int64_t t = 0; t < tokens; t += kTileTokens)
        tiles[tokens - t < kTileTokens ? tokens - t : kTileTokens](a + t * a_stride, a_stride, static_cast<const B*>(b),
                                                                   b_stride, k, c + t * c_stride, c_stride);
}

void product(int format, const float* a, ptrdiff_t a_stride, int64_t tokens, const void* b, ptrdiff_t b_stride,
             int64_t k, float* c, ptrdiff_t c_stride) {
    const auto run = format == kFloat16 ? product_from<Half> : product_from<float>;
    run(a, a_stride, tokens, b, b_stride, k, c, c_stride);
}

// How far ahead of its use a weight is fetched. Measured, as was reading rows that lie far apart side by side: a head
// that comes from memory arrives 1.4 times as fast. Rows that are neighbours would take longer than one by one.
constexpr int64_t kBytesAhead = 512;

template <typename W, int kTogether>
void dot_rows_of(const void* rows, int64_t apart, int64_t k, int64_t n_rows, const float* x, float* y) {
    constexpr int kSums = 2, kVectors = 4;  // of each row: sums side by side, and registers per step
    const auto* row = static_cast<const W*>(rows);
    for (int64_t r = 0; r < n_rows; ++r, row += k) {
        Floats sum[kTogether][kSums] = {};
        int64_t i = 0;
        for (; i + kVectors * kLanes <= k; i += kVectors * kLanes) {
#pragma GCC unroll 4
            for (int s = 0; s < kTogether; ++s)
                __builtin_prefetch(reinterpret_cast<const char*>(row + s * apart * k + i) + kBytesAhead);
#pragma GCC unroll 4
            for (int j = 0; j < kVectors; ++j) {
                const Floats factor = load(x + i + j * kLanes);
#pragma GCC unroll 4
                for (int s = 0; s < kTogether; ++s)
                    sum[s][j % kSums] += load(row + s * apart * k + i + j * kLanes) * factor;
            }
        }
        for (int s = 0; s < kTogether; ++s) {
            float total = sum_lanes(sum[s][0] + sum[s][1]);
            for (int64_t rest = i; rest < k; ++rest) total += one(row + s * apart * k + rest) * x[rest];
            y[s * apart + r] = total;
        }
    }
}

template <int kTogether>
void dot_rows_from(int format, const void* rows, int64_t apart, int64_t k, int64_t n_rows, const float* x, float* y) {
    if (format == kFloat32) return dot_rows_of<float, kTogether>(rows, apart, k, n_rows, x, y);
    if (format == kFloat16) return dot_rows_of<Half, kTogether>(rows, apart, k, n_rows, x, y);
    return dot_rows_of<Brain, kTogether>(rows, apart, k, n_rows, x, y);
}

void dot_rows(int format, const void* rows, int64_t apart, int64_t k, int64_t n_rows, const float* x, float* y) {
    const auto run = apart ? dot_rows_from<kStreams> : dot_rows_from<1>;
    run(format, rows, apart, k, n_rows, x, y);
}

constexpr MathSet kFunctions = {
    .rms_norm = rms_norm,
    .swiglu = swiglu,
    .powers = powers,
    .to_float = to_float,
    .to_half = to_half,
    .product = product,
    .dot_rows = dot_rows,
};
