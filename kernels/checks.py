"""What the ops refuse, with shapes in the message. The checks run in each op and in its fake, so a traced and an eager
call fail with the same words, and before any backend sees a pointer.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fbitrain.kernels.layout import MAX_K, MODES, n_words, scale_shape


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


def check_binary_linear(
    x: Tensor,
    words: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    scale: str,
    k: int,
    group_size: int,
    mode: str = "float",
) -> None:
    """x may have any strides; the weight's tensors must be contiguous, for copying them in every call would be slow."""
    _check_words("binary_linear", "words", words, k, 2)
    if x.dim() < 1 or x.shape[-1] != k or not x.is_floating_point():
        raise ValueError(f"binary_linear needs a float x [..., {k}], not {_describe(x)}")
    if k < 1:
        raise ValueError(f"binary_linear needs at least one column, not x {_describe(x)}")
    if mode not in MODES:
        raise ValueError(f"binary_linear: mode={mode!r} is unknown; choose {' or '.join(MODES)}")
    wanted = scale_shape(scale, words.shape[0], k, group_size)
    if beta is not None and scale == "group":
        raise ValueError("binary_linear: scale='group' has no shift; beta must be None")
    _check_scales("alpha", alpha, scale, wanted)
    if beta is None:
        _check_contiguous("binary_linear", words=words, alpha=alpha)
        _check_devices("binary_linear", x, words, alpha)
    else:
        _check_scales("beta", beta, scale, wanted)
        _check_contiguous("binary_linear", words=words, alpha=alpha, beta=beta)
        _check_devices("binary_linear", x, words, alpha, beta)


def _check_scales(name: str, value: Tensor, scale: str, wanted: tuple[int, int]) -> None:
    if value.shape != wanted or not value.is_floating_point():
        raise ValueError(
            f"binary_linear: {name} of scale={scale!r} must be float {list(wanted)}, not {_describe(value)}"
        )


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
