// How the bit planes of int8 activations lie for linear_planes.cu: for each token and chunk of 512 columns, 8 planes of
// 16 words; bit j of column k's value is bit k % 32 of plane j's word.
#pragma once
#include "linear_tile.cuh"

constexpr int PLANES = 8;

__device__ inline u64 plane_position(int token, int plane, int word, int chunks) {
    return ((u64(token) * chunks + word / CHUNK_WORDS) * PLANES + plane) * CHUNK_WORDS + word % CHUNK_WORDS;
}
