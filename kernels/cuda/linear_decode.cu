// linear_decode.cuh without salient weights: binary_linear and mixture_linear.
#include "linear_decode.cuh"

DECODE_KERNELS(decode, false)
