// Runs CUDA C++ kernels on the CPU: g++ -x c++ -include simt.h kernel.cu
//
// Blocks run one after another. Inside a block every CUDA thread is a fiber (fibers.h) that runs until it waits at a
// barrier or in a warp collective; in which order they take turns is chosen per launch. What is found: missing barriers
// (some order gives other results), divergent and unreachable barriers, collectives whose lanes disagree, addresses
// outside arrays (unmapped pages), misaligned addresses, uninitialised shared memory (poisoned before each block),
// asynchronous copies that nobody waited for. What is not: time, inline assembly (kernels have a second body under
// SIMT_HOST), races between blocks.
//
// Needs x86-64 and g++; nothing of the CUDA toolkit.
#pragma once
#define SIMT_HOST 1
#include "simt_types.h"
#include "simt_fibers.h"
#include "simt_warp.h"
#include "simt_memory.h"
#include "simt_tensor_core.h"
#include "simt_intrinsics.h"
#include "simt_launch.h"
