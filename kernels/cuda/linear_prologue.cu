// Before a product: the activations, scaled where the weight's columns have scales, quantized in mode int8, and written
// in the order in which the product kernel reads them; with what each token adds to its results.
//
// One block per token. Reading x and writing z is all the traffic there is; x is read twice (once more from L2) where
// the largest value must be known before the first can be quantized.
#include "linear_fp32.cuh"
#include "linear_planes.cuh"
#include "linear_product.cuh"
#include "linear_reduce.cuh"

struct Prologue {
    const void* x;          // [M, K] of `dtype`
    const float* alpha;     // [K] of scale "column", or null
    const float* gates;     // [M, n_experts] of a mixture, or null
    const float* alpha_in;  // [n_experts, K]
    const float* beta;      // [K] of scale "column"; null: 1
    void* z;
    float* token_scale;     // [M] of int8 activations: z ≈ q·token_scale; NaN or infinity if the token holds any
    float* token_shift;     // [M]: Σ x·β; null if the weight has no shift
    i32* token_sum;         // [M]: Σ q, for bit planes
    i32 k, dtype, n_experts;

    __device__ float x_at(int token, int column) const { return load_as_float(x, u64(token) * k + column, dtype); }

    // x times the scale of its column, in fp32.
    __device__ float scaled(int token, int column) const {
        const float value = x_at(token, column);
        if (alpha) return __fmul_rn(value, rounded(alpha[column], dtype));
        if (!gates) return value;
        return __fmul_rn(value, mixed(gates + u64(token) * n_experts, alpha_in, n_experts, k, column, dtype));
    }
};

#define PROLOGUE_PARAMETERS                                                                                         \
    const void *x, const float *alpha, const float *gates, const float *alpha_in, const float *beta, void *z,       \
        float *token_scale, float *token_shift, i32 *token_sum, i32 k, i32 dtype, i32 n_experts
#define PROLOGUE \
    Prologue { x, alpha, gates, alpha_in, beta, z, token_scale, token_shift, token_sum, k, dtype, n_experts }

// Σ x·β over a token, as token_shift; not at all if that is null.
__device__ inline void write_shift(const Prologue& p, int token) {
    __shared__ float per_warp[WARP];
    if (!p.token_shift) return;
    float sum = 0;
    for (int c = threadIdx.x; c < p.k; c += blockDim.x)
        sum += p.x_at(token, c) * (p.beta ? rounded(p.beta[c], p.dtype) : 1.0f);
    sum = block_reduce(sum, per_warp, [](float a, float b) { return a + b; });
    if (threadIdx.x == 0) p.token_shift[token] = sum;
}

// The activations as floats of 16 bits, for FloatSigns<T>.
template <class T> __device__ void prepare_half(const Prologue& p) {
    const int token = blockIdx.x, chunks = ceil_div(p.k, CHUNK);
    write_shift(p, token);
    for (int c = threadIdx.x; c < chunks * CHUNK; c += blockDim.x) {
        const float value = c < p.k ? p.scaled(token, c) : 0.0f;
        static_cast<T*>(p.z)[position<FloatSigns<T>>(token, c, chunks)] = from_float<T>(value);
    }
}

// How one token is quantized: q = round(z·inverse) to even, scale = max |z| / 127. If that is no normal number, q is 0.
struct Quantizer {
    float scale, inverse;

    __device__ int q(float value) const { return __float2int_rn(__fmul_rn(value, inverse)); }
};

__device__ inline Quantizer quantizer(const Prologue& p, int token) {
    __shared__ u32 per_warp[WARP];
    // As integers, the bits of positive floats are in the floats' order, infinity and NaN above all numbers.
    u32 largest = 0;
    for (int c = threadIdx.x; c < p.k; c += blockDim.x) {
        const u32 magnitude = bits_of(p.scaled(token, c)) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    largest = block_reduce(largest, per_warp, [](u32 a, u32 b) { return a > b ? a : b; });
    float scale = __fdiv_rn(__uint_as_float(largest), 127.0f);
    if (scale < 1.17549435e-38f) scale = 0;
    if (threadIdx.x == 0) p.token_scale[token] = scale;
    return {scale, scale > 0 ? __fdiv_rn(1.0f, scale) : 0.0f};
}

// The activations as int8, for Int8Signs.
__device__ void prepare_int8(const Prologue& p) {
    const int token = blockIdx.x, chunks = ceil_div(p.k, CHUNK);
    write_shift(p, token);
    const Quantizer quantize = quantizer(p, token);
    for (int c = threadIdx.x; c < chunks * CHUNK; c += blockDim.x) {
        const int q = c < p.k ? quantize.q(p.scaled(token, c)) : 0;
        static_cast<i8*>(p.z)[position<Int8Signs>(token, c, chunks)] = i8(q);
    }
}

// The activations as int8, cut into their bits, for linear_planes.cu. A warp takes a word's 32 columns at a time.
__device__ void prepare_planes(const Prologue& p) {
    __shared__ i32 per_warp[WARP];
    const int token = blockIdx.x, words = ceil_div(p.k, CHUNK) * CHUNK_WORDS, lane = threadIdx.x % WARP;
    write_shift(p, token);
    const Quantizer quantize = quantizer(p, token);
    i32 sum = 0;
    for (int word = threadIdx.x / WARP; word < words; word += blockDim.x / WARP) {
        const int c = word * WORD + lane, q = c < p.k ? quantize.q(p.scaled(token, c)) : 0;
        sum += q;
        u32 mine = 0;
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++) {
            const u32 bits = __ballot_sync(ALL_LANES, q >> plane & 1);
            if (lane == plane) mine = bits;
        }
        if (lane < PLANES) static_cast<u32*>(p.z)[plane_position(token, lane, word, ceil_div(p.k, CHUNK))] = mine;
    }
    sum = block_reduce(sum, per_warp, [](i32 a, i32 b) { return a + b; });
    if (threadIdx.x == 0) p.token_sum[token] = sum;
}

// The activations as fp32, for linear_fp32.cu.
__device__ void prepare_fp32(const Prologue& p) {
    const int token = blockIdx.x, spans = ceil_div(p.k, SPAN);
    write_shift(p, token);
    for (int c = threadIdx.x; c < spans * SPAN; c += blockDim.x)
        static_cast<float*>(p.z)[fp32_position(token, c, spans)] = c < p.k ? p.scaled(token, c) : 0.0f;
}

#define PROLOGUE_KERNEL(name, prepare) \
    extern "C" __global__ void __launch_bounds__(1024) name(PROLOGUE_PARAMETERS) { prepare(PROLOGUE); }

PROLOGUE_KERNEL(prologue_float16, prepare_half<f16>)
PROLOGUE_KERNEL(prologue_bfloat16, prepare_half<bf16>)
PROLOGUE_KERNEL(prologue_int8, prepare_int8)
PROLOGUE_KERNEL(prologue_planes, prepare_planes)
PROLOGUE_KERNEL(prologue_fp32, prepare_fp32)
