"""What a CUDA op launches: which kernels, on which grids, with which arguments. Pure arithmetic: no torch, no CuPy.

cupy_backend launches these plans on a GPU; the tests launch the same plans on the CPU, from the same sources.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from fbitrain.kernels.layout import n_words

WARP = 32  # threads
POPC_TOKENS = 4  # up to here xnor_gemm is bound by reading the weight, which the ordinary cores keep up with
SMALL_TILE_TOKENS = 64  # up to here tiles of 16 tokens waste less than tiles of 128
TENSOR_CORES_COUNT_BITS = 80  # the first compute capability whose tensor cores multiply bits with AND
# By op. 75 is the oldest that CUDA 13 compiles for; cp.async and the tensor-core products came with 80.
MIN_CAPABILITY = {
    **dict.fromkeys(("pack_signs", "unpack_signs", "xnor_gemm"), 75),
    **dict.fromkeys(("binary_linear", "mixture_linear", "partial_linear"), 80),
}


class Gpu(NamedTuple):
    """A GPU as far as the choice of a backend depends on it."""

    capability: int  # 80 for compute capability 8.0
    why_not: str = ""  # why no kernel can run on it


class Long(NamedTuple):
    """A 64-bit integer argument."""

    value: int


Argument = str | int | float | Long  # a str names a tensor, an int is a C int, a float a C float


class Array(NamedTuple):
    """A result or temporary that the launches fill. `dtype` is torch's name of it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Launch:
    """One kernel launch."""

    source: str  # "pack" is cuda/pack.cu
    kernel: str
    grid: tuple[int, int, int]  # blocks
    block: tuple[int, int, int]  # threads
    arguments: tuple[Argument, ...]
    shared_bytes: int = 0  # dynamic shared memory


@dataclass(frozen=True)
class Plan:
    """The launches of one call, in order, and the arrays they need beside the call's own tensors, uninitialised."""

    arrays: dict[str, Array]
    launches: tuple[Launch, ...] = field(default=())


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def plan_pack_signs(rows: int, k: int, dtype: str) -> Plan:
    """w [rows, K] of `dtype` -> words [rows, Kw]."""
    arrays = {"words": Array((rows, n_words(k)), "int32")}
    return Plan(arrays, _one_warp_per_1024("pack_signs", dtype, ("w", "words"), rows, k))


def plan_unpack_signs(rows: int, k: int, dtype: str) -> Plan:
    """words [rows, Kw] -> signs [rows, K] of `dtype`."""
    arrays = {"signs": Array((rows, k), dtype)}
    return Plan(arrays, _one_warp_per_1024("unpack_signs", dtype, ("words", "signs"), rows, k))


def _one_warp_per_1024(op: str, dtype: str, tensors: tuple[str, ...], rows: int, k: int) -> tuple[Launch, ...]:
    warps = 8  # per block, as in pack.cu
    blocks = ceil_div(rows * ceil_div(n_words(k), WARP), warps)
    if not blocks:
        return ()
    arguments: tuple[Argument, ...] = (*tensors, Long(rows), k)
    return (Launch("pack", f"{op}_{dtype}", (blocks, 1, 1), (warps * WARP, 1, 1), arguments),)


def plan_xnor_gemm(m: int, n: int, k: int, capability: int) -> Plan:
    """a [M, Kw], b [N, Kw] -> product int32 [M, N]. `capability` is 80 for compute capability 8.0."""
    arrays = {"product": Array((m, n), "int32")}
    if not m or not n:
        return Plan(arrays)
    if m <= POPC_TOKENS or capability < TENSOR_CORES_COUNT_BITS:
        return Plan(arrays, (_xnor_popc(m, n, k),))
    arrays |= {"a_counts": Array((m,), "int32"), "b_counts": Array((n,), "int32")}
    launches = (_row_popcounts("a", m, k), _row_popcounts("b", n, k), _xnor_tile(m, n, k))
    return Plan(arrays, launches)


def _xnor_popc(m: int, n: int, k: int) -> Launch:
    warps, tokens = 8, next(tokens for tokens in (1, 2, 4) if tokens >= min(m, POPC_TOKENS))
    grid = (ceil_div(n, warps), min(ceil_div(m, tokens), 65535), 1)
    return Launch("xnor_popc", f"xnor_popc_{tokens}", grid, (warps * WARP, 1, 1), ("a", "b", "product", m, n, k))


def _row_popcounts(name: str, rows: int, k: int) -> Launch:
    warps = 8
    arguments = (name, f"{name}_counts", rows, n_words(k))
    return Launch("xnor_tile", "row_popcounts", (ceil_div(rows, warps), 1, 1), (warps * WARP, 1, 1), arguments)


def _xnor_tile(m: int, n: int, k: int) -> Launch:
    bm, bn, warps = (16, 64, 4) if m <= SMALL_TILE_TOKENS else (128, 128, 8)
    stages, pitch = 3, 20  # as in xnor_tile.cu
    return Launch(
        source="xnor_tile",
        kernel=f"xnor_tile_{bm}x{bn}",
        grid=(ceil_div(m, bm) * ceil_div(n, bn), 1, 1),
        block=(warps * WARP, 1, 1),
        arguments=("a", "b", "a_counts", "b_counts", "product", m, n, k),
        shared_bytes=stages * (bm + bn) * pitch * 4,
    )
