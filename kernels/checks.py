"""What the ops refuse: each check raises ValueError with shapes in the message. The checks run in each op and in its
fake, before any backend is called, so a traced and an eager call fail with the same words.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens, E scaling experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fbitrain.kernels.layout import MAX_EXPERTS, MAX_K, MODES, NARROW_COLUMNS, n_words, scale_shape
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight


def not_finite(row: int, shape: Sequence[int]) -> ValueError:
    """What every backend raises in mode "int8" if row `row` of its activations `shape` is not finite."""
    return ValueError(f"mode='int8' needs finite activations: row {row} of {list(shape)} holds NaN or infinity")


def check_pack_signs(w: Tensor) -> None:
    if w.dim() < 1 or not w.is_floating_point():
        raise ValueError(f"pack_signs needs a float tensor [..., K], not {_describe(w)}")


def check_unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> None:
    _check_words("unpack_signs", "words", words, k, None)
    if not dtype.is_floating_point:
        raise ValueError(f"unpack_signs gives a float dtype, not {dtype}")


def check_xnor_gemm(a: Tensor, b: Tensor, k: int) -> None:
    _check_words("xnor_gemm", "a", a, k, 2)
    _check_words("xnor_gemm", "b", b, k, 2)
    _check_contiguous("xnor_gemm", a=a, b=b)
    _check_devices("xnor_gemm", a, b)


def check_binary_linear(x: Tensor, weight: BinaryWeight, mode: str = "float") -> None:
    """x may have any strides; the weight's tensors must be contiguous, for copying them in every call would be slow."""
    op = "binary_linear"
    words, alpha, beta, scale, k, group_size = weight
    _check_activations(op, x, words, k, mode)
    wanted = scale_shape(scale, words.shape[0], k, group_size)
    if beta is not None and scale == "group":
        raise ValueError(f"{op}: scale='group' has no shift; beta must be None")
    scales = {"alpha": alpha} | ({} if beta is None else {"beta": beta})
    for name, value in scales.items():
        _check_float(op, f"{name} of scale={scale!r}", value, wanted)
    _check_contiguous(op, words=words, **scales)
    _check_devices(op, x, words, *scales.values())


def check_mixture_linear(x: Tensor, weight: MixtureWeight, mode: str = "float") -> None:
    """x and gates may have any strides; the weight's other tensors must be contiguous."""
    op = "mixture_linear"
    words, gates, alpha_in, alpha_out, k = weight
    _check_activations(op, x, words, k, mode)
    n_experts = alpha_in.shape[0] if alpha_in.dim() else 0
    if not 1 <= n_experts <= MAX_EXPERTS:
        raise ValueError(f"{op}: alpha_in must be float [1 to {MAX_EXPERTS} experts, {k}], not {_describe(alpha_in)}")
    _check_float(op, "alpha_in", alpha_in, (n_experts, k))
    _check_float(op, "alpha_out", alpha_out, (n_experts, words.shape[0]))
    if gates.shape != (*x.shape[:-1], n_experts) or gates.dtype != torch.float32:
        raise ValueError(f"{op}: gates must be float32 {[*x.shape[:-1], n_experts]}, not {_describe(gates)}")
    _check_contiguous(op, words=words, alpha_in=alpha_in, alpha_out=alpha_out)
    _check_devices(op, x, words, gates, alpha_in, alpha_out)


def check_partial_linear(x: Tensor, weight: PartialWeight, mode: str = "float") -> None:
    """x may have any strides; the weight's tensors must be contiguous. What row_starts and columns hold is for the
    backends to check: it would cost as much as the product."""
    op = "partial_linear"
    _check_activations(op, x, weight.words, weight.k, mode)
    if weight.scale not in ("row", "group"):
        raise ValueError(f"{op}: scale={weight.scale!r} is unknown; choose row or group")
    wanted = scale_shape(weight.scale, weight.words.shape[0], weight.k, weight.group_size)
    _check_float(op, f"alpha of scale={weight.scale!r}", weight.alpha, wanted)
    _check_salient(op, weight)
    tensors = {name: value for name, value in weight._asdict().items() if isinstance(value, Tensor)}
    _check_contiguous(op, **tensors)
    _check_devices(op, x, *tensors.values())


def _check_salient(op: str, weight: PartialWeight) -> None:
    words, _, _, row_starts, columns, values, value_scale, k, _ = weight
    n = words.shape[0]
    if row_starts.dtype != torch.int32 or row_starts.shape != (n + 1,):
        raise ValueError(f"{op}: row_starts must be int32 [{n + 1}], not {_describe(row_starts)}")
    column_dtype = torch.uint16 if k <= NARROW_COLUMNS else torch.int32
    if columns.dtype != column_dtype or columns.dim() != 1:
        wanted = str(column_dtype).removeprefix("torch.")
        raise ValueError(f"{op}: columns of rows of {k} must be {wanted} [entries], not {_describe(columns)}")
    if values.dtype not in (torch.int8, torch.float16) or values.shape != columns.shape:
        raise ValueError(f"{op}: values must be int8 or float16 {list(columns.shape)}, not {_describe(values)}")
    if (value_scale is None) != (values.dtype == torch.float16):
        raise ValueError(f"{op}: int8 values need a value_scale and float16 values none, not {_describe(values)}")
    if value_scale is not None and (value_scale.dtype != torch.float32 or value_scale.shape != (n, 1)):
        raise ValueError(f"{op}: value_scale must be float32 {[n, 1]}, not {_describe(value_scale)}")


def _check_activations(op: str, x: Tensor, words: Tensor, k: int, mode: str) -> None:
    _check_words(op, "words", words, k, 2)
    if x.dim() < 1 or x.shape[-1] != k or not x.is_floating_point():
        raise ValueError(f"{op} needs a float x [..., {k}], not {_describe(x)}")
    if k < 1:
        raise ValueError(f"{op} needs at least one column, not x {_describe(x)}")
    if mode not in MODES:
        raise ValueError(f"{op}: mode={mode!r} is unknown; choose {' or '.join(MODES)}")


def _check_float(op: str, name: str, value: Tensor, wanted: tuple[int, int]) -> None:
    if value.shape != wanted or not value.is_floating_point():
        raise ValueError(f"{op}: {name} must be float {list(wanted)}, not {_describe(value)}")


def _check_contiguous(op: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, not {_describe(tensor)} with strides {tensor.stride()}")


def _check_words(op: str, name: str, words: Tensor, k: int, dim: int | None) -> None:
    if not 0 <= k <= MAX_K:
        raise ValueError(f"{op}: k={k} is not a row length; it goes from 0 to {MAX_K}")
    if words.dtype != torch.int32 or words.dim() < 1 or (dim and words.dim() != dim) or words.shape[-1] != n_words(k):
        rows = "rows, " if dim == 2 else "..., "
        raise ValueError(
            f"{op}: {name} must be int32 [{rows}{n_words(k)}] to hold {k} bits a row, not {_describe(words)}"
        )


def _check_devices(op: str, *tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors}) > 1:
        devices = {str(tensor.device) for tensor in tensors}
        raise ValueError(f"{op}: all tensors must be on one device, not on {' and '.join(sorted(devices))}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
