// linear_decode.cuh with salient weights: partial_linear.
#include "linear_decode.cuh"

DECODE_KERNELS(partial, true)
