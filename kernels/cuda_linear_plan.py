"""What binary_linear, mixture_linear and partial_linear launch on CUDA: a prologue that prepares the activations, then
one product. Pure arithmetic, as cuda_plan.

Letters: N out_features, K in_features, M tokens, E scaling experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from fbitrain.kernels.cuda_plan import WARP, Argument, Array, Launch, Plan, ceil_div

DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # of activations and results, as linear_dtype.cuh numbers them
CHUNK = 512  # columns; activations for tensor cores are padded to it
SPAN = 1024  # columns; fp32 activations are padded to it
TILE_ROWS, TILE_TOKENS = 16, 8  # of one tensor-core product
PLANES = 8  # bits of an int8
MAX_GRID_ROWS = 65535  # blocks along the grid's second dimension

# Up to here the time to read the weight exceeds that of the products, however few of their columns are used.
PLANES_TOKENS = 16
DECODE_TOKENS = 32
BITS_ON_TENSOR_CORES = range(80, 100)  # compute capabilities

# A product kernel's parameters, as PRODUCT_PARAMETERS of linear_product.cuh. Tensors that a call has not are null.
PRODUCT_TENSORS = (
    *("z", "words", "y", "token_scale", "token_shift", "alpha", "beta", "gates", "alpha_out"),
    *("row_starts", "columns", "values", "value_scale"),
)
PROLOGUE_TENSORS = ("x", "alpha_K", "gates", "alpha_in", "beta_K", "z", "token_scale", "token_shift", "token_sum")


@dataclass(frozen=True)
class LinearCall:
    """One call: y [M, N] of x [M, K]. Tensors that the launches name are x, words and, where the call has them:

    alpha_K, beta_K [K] for scale "column"; alpha, beta for the other patterns; gates [M, E], alpha_in [E, K] and
    alpha_out [E, N] for a mixture; row_starts, columns, values, value_scale of salient weights. Scales are fp32.
    """

    m: int
    n: int
    k: int
    dtype: str  # of x and y
    mode: str = "float"
    scale: str = "column"  # a mixture is "column" too
    group_size: int = 0  # of scale "group"
    has_shift: bool = False  # β
    n_experts: int = 0  # of a mixture
    column_bytes: int = 0  # of salient weights
    value_bytes: int = 0

    @property
    def groups(self) -> int:
        return self.group_size if self.scale == "group" else 0

    @property
    def on_tensor_cores(self) -> bool:
        return self.mode == "int8" or self.dtype != "float32"


def plan_linear(call: LinearCall, capability: int) -> Plan:
    """The launches of `call`; `capability` is 80 for compute capability 8.0. Raises ValueError for too many rows."""
    if not call.m or not call.n:
        return Plan({"y": Array((call.m, call.n), call.dtype)})
    product = _product(call, capability)
    if product.grid[1] > MAX_GRID_ROWS:
        raise ValueError(f"a weight of {call.n} rows is too long for one CUDA grid; split it")
    layout = "planes" if product.source == "linear_planes" else _format(call)
    return Plan(_arrays(call, layout), (_prologue(call, layout), product))


def _format(call: LinearCall) -> str:
    """What the activations become: the name that kernels carry."""
    if not call.on_tensor_cores:
        return "fp32"
    return "int8" if call.mode == "int8" else call.dtype


def _product(call: LinearCall, capability: int) -> Launch:
    if not call.on_tensor_cores:
        return _fp32(call)
    if not call.value_bytes:
        in_bits = call.mode == "int8" and not call.groups and capability in BITS_ON_TENSOR_CORES
        if in_bits and call.m <= PLANES_TOKENS:
            return _planes(call)
        if call.m > DECODE_TOKENS:
            return _prefill(call)
    return _decode(call)


def _decode(call: LinearCall) -> Launch:
    name = "partial" if call.value_bytes else "decode"
    tiles = ceil_div(call.m, TILE_TOKENS), ceil_div(call.n, TILE_ROWS)
    return _launch(call, f"linear_{name}", f"{name}_{_format(call)}", tiles, _warps_over_chunks(call))


def _planes(call: LinearCall) -> Launch:
    tokens = 1 if call.m == 1 else 8
    tiles = ceil_div(call.m, tokens), ceil_div(call.n, TILE_ROWS)
    return _launch(call, "linear_planes", f"planes_{tokens}", tiles, _warps_over_chunks(call), ("token_sum",))


def _warps_over_chunks(call: LinearCall) -> int:
    return min(8, ceil_div(call.k, CHUNK))


def _prefill(call: LinearCall) -> Launch:
    rows, tokens, warps = (64 if call.groups and call.mode == "int8" else 128), 64, 4  # as in linear_prefill.cu
    tiles = ceil_div(call.m, tokens), ceil_div(call.n, rows)
    step_bytes = tokens * 128 * (1 if call.mode == "int8" else 2)
    shared_bytes = max(2 * step_bytes, tokens * (rows + 4) * 4)  # two steps of activations; later, the sums
    return _launch(call, "linear_prefill", f"prefill_{_format(call)}", tiles, warps, shared_bytes=shared_bytes)


def _fp32(call: LinearCall) -> Launch:
    rows, tokens, warps = 32, (1 if call.m == 1 else 4), 8  # as in linear_fp32.cu
    return _launch(call, "linear_fp32", f"fp32_{tokens}", (ceil_div(call.m, tokens), ceil_div(call.n, rows)), warps)


def _launch(
    call: LinearCall,
    source: str,
    kernel: str,
    tiles: tuple[int, int],
    warps: int,
    more: tuple[str, ...] = (),
    shared_bytes: int = 0,
) -> Launch:
    alpha_stride = 0 if call.scale == "tensor" else 1
    sizes = (call.m, call.n, call.k, DTYPES[call.dtype], alpha_stride, call.groups, call.n_experts)
    arguments: tuple[Argument, ...] = (*PRODUCT_TENSORS, *sizes, call.column_bytes, call.value_bytes, *more)
    # Sums of integers need registers of their own for what the groups' scales make of them.
    name = kernel + ("_groups" if call.groups and call.mode == "int8" else "")
    return Launch(source, name, (*tiles, 1), (warps * WARP, 1, 1), arguments, shared_bytes)


def _prologue(call: LinearCall, layout: str) -> Launch:
    """One block per token; few tokens get large blocks, because nothing else keeps the GPU busy."""
    threads = min(1024 if call.m <= TILE_TOKENS else 256, ceil_div(call.k, WARP) * WARP)
    arguments: tuple[Argument, ...] = (*PROLOGUE_TENSORS, call.k, DTYPES[call.dtype], call.n_experts)
    return Launch("linear_prologue", f"prologue_{layout}", (call.m, 1, 1), (threads, 1, 1), arguments)


def _arrays(call: LinearCall, layout: str) -> dict[str, Array]:
    arrays = {"y": Array((call.m, call.n), call.dtype)}
    padded = ceil_div(call.k, CHUNK) * CHUNK
    tokens = ceil_div(call.m, TILE_TOKENS) * TILE_TOKENS
    if layout == "fp32":
        arrays["z"] = Array((call.m, ceil_div(call.k, SPAN) * SPAN), "float32")
    elif layout == "planes":
        arrays["z"] = Array((call.m, PLANES, padded // 32), "int32")
        arrays["token_sum"] = Array((call.m,), "int32")
    else:
        arrays["z"] = Array((tokens, padded), layout)
    if call.mode == "int8":
        arrays["token_scale"] = Array((call.m,), "float32")
    if call.has_shift:
        arrays["token_shift"] = Array((call.m,), "float32")
    return arrays
