"""The binary ops as torch operators `fbitrain::…`, and which implementation runs them.

Call the functions here: they work in eager mode and under torch.compile, and check shapes and dtypes. Every op lists
its backends in BACKENDS, fastest first; `select_backend` says which one runs and why the others do not. The environment
variable FBITRAIN_BACKEND forces one by name.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens, G group size.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels import reference
from fbitrain.kernels.layout import n_words, scale_shape

FORCE_VARIABLE = "FBITRAIN_BACKEND"


class BackendError(RuntimeError):
    """FBITRAIN_BACKEND asks for a backend that does not exist or cannot run here."""


@dataclass(frozen=True)
class Availability:
    """Whether a backend runs an op on a device type and dtype, and the reason, if there is one to tell."""

    runs: bool
    reason: str = ""

    def __str__(self) -> str:
        return ("yes" if self.runs else "no") + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Backend:
    """One implementation of one op. `availability(device_type, dtype)` must be cheap: it is asked on every call."""

    name: str
    run: Callable[..., Tensor]
    availability: Callable[[str, torch.dtype], Availability]


@dataclass(frozen=True)
class Choice:
    """Which backend runs `op`, and for every known backend whether it could."""

    op: str
    backend: str
    reasons: dict[str, Availability]

    def __str__(self) -> str:
        return f"{self.op}: {' | '.join(f'{name} {why}' for name, why in self.reasons.items())} -> {self.backend}"


def _anywhere(device_type: str, dtype: torch.dtype) -> Availability:
    return Availability(True)


BACKENDS: dict[str, list[Backend]] = {
    op: [Backend("reference", getattr(reference, op), _anywhere)]
    for op in ("pack_signs", "unpack_signs", "xnor_gemm", "binary_linear")
}


def select_backend(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The first backend of `op` that runs on `device_type` ("cpu", "cuda") and `dtype`; FBITRAIN_BACKEND forces one.

    Raises BackendError when the forced backend is unknown or cannot run.
    """
    reasons = {backend.name: backend.availability(device_type, dtype) for backend in BACKENDS[op]}
    forced = os.environ.get(FORCE_VARIABLE, "")
    if not forced:
        return Choice(op, next(name for name, why in reasons.items() if why.runs), reasons)
    if forced not in reasons:
        raise BackendError(
            f"{FORCE_VARIABLE}={forced} is no backend of {op}; choose {' or '.join(reasons)}, or unset it"
        )
    if not reasons[forced].runs:
        why = reasons[forced].reason
        raise BackendError(f"{FORCE_VARIABLE}={forced} cannot run {op} on {device_type} {dtype}: {why}; unset it")
    return Choice(op, forced, reasons)


def pack_signs(w: Tensor) -> Tensor:
    """The signs of a float tensor w [..., K] as int32 words [..., Kw]; bit 1 means w >= 0."""
    return _operator("pack_signs")(w)


def unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """int32 words [..., Kw] as ±1 [..., k] of `dtype`."""
    return _operator("unpack_signs")(words, k, dtype)


def xnor_gemm(a: Tensor, b: Tensor, k: int) -> Tensor:
    """a bᵀ for packed ±1 matrices a [M, Kw] and b [N, Kw] of row length `k`: int32 [M, N], exact."""
    return _operator("xnor_gemm")(a, b, k)


def binary_linear(
    x: Tensor, words: Tensor, alpha: Tensor, beta: Tensor | None, scale: str, k: int, group_size: int
) -> Tensor:
    """x [..., k] times ŵᵀ for ŵ = α·sign(W) + β, the signs of W packed in `words` [N, Kw]; [..., N] in x's dtype.

    `alpha` and `beta` have the shape of `layout.scale_shape(scale, N, k, group_size)`. For inference: backward raises.
    """
    return _operator("binary_linear")(x, words, alpha, beta, scale, k, group_size)


def _operator(op: str) -> Callable[..., Tensor]:
    operator: Callable[..., Tensor] = getattr(torch.ops.fbitrain, op)
    return operator


# Checks, one per op. They run in the op itself and in its fake, so a traced and an eager call fail with the same words.


def _check_pack_signs(w: Tensor) -> None:
    if w.dim() < 1 or not w.is_floating_point():
        raise ValueError(f"pack_signs needs a float tensor [..., K], not {_describe(w)}")


def _check_unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> None:
    _check_words("unpack_signs", "words", words, k, None)
    if not dtype.is_floating_point:
        raise ValueError(f"unpack_signs gives a float dtype, not {dtype}")


def _check_xnor_gemm(a: Tensor, b: Tensor, k: int) -> None:
    _check_words("xnor_gemm", "a", a, k, 2)
    _check_words("xnor_gemm", "b", b, k, 2)
    _check_devices("xnor_gemm", a, b)


def _check_binary_linear(
    x: Tensor, words: Tensor, alpha: Tensor, beta: Tensor | None, scale: str, k: int, group_size: int
) -> None:
    _check_words("binary_linear", "words", words, k, 2)
    if x.dim() < 1 or x.shape[-1] != k or not x.is_floating_point():
        raise ValueError(f"binary_linear needs a float x [..., {k}], not {_describe(x)}")
    wanted = scale_shape(scale, words.shape[0], k, group_size)
    if beta is not None and scale == "group":
        raise ValueError("binary_linear: scale='group' has no shift; beta must be None")
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value is not None and (tuple(value.shape) != wanted or not value.is_floating_point()):
            raise ValueError(
                f"binary_linear: {name} of scale={scale!r} must be float {list(wanted)}, not {_describe(value)}"
            )
    _check_devices("binary_linear", x, words, alpha, *([] if beta is None else [beta]))


def _check_words(op: str, name: str, words: Tensor, k: int, dim: int | None) -> None:
    rows = "rows, " if dim == 2 else "..., "
    if words.dtype != torch.int32 or words.dim() < 1 or (dim and words.dim() != dim) or words.shape[-1] != n_words(k):
        raise ValueError(
            f"{op}: {name} must be int32 [{rows}{n_words(k)}] to hold {k} bits a row, not {_describe(words)}"
        )


def _check_devices(op: str, *tensors: Tensor) -> None:
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, not on {' and '.join(sorted(devices))}")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


# What each op returns, as an empty tensor: all that torch.compile needs to know (the "fake").


def _empty_pack_signs(w: Tensor) -> Tensor:
    return w.new_empty((*w.shape[:-1], n_words(w.shape[-1])), dtype=torch.int32)


def _empty_unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return words.new_empty((*words.shape[:-1], k), dtype=dtype)


def _empty_xnor_gemm(a: Tensor, b: Tensor, k: int) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


def _empty_binary_linear(x: Tensor, words: Tensor, *scales_and_sizes: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


def _refuse_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("packed binary layers are for inference and have no backward; train the model with BinaryLinear")


def _define_operators() -> torch.library.Library | None:
    if hasattr(torch.ops.fbitrain, "binary_linear"):
        return None  # this file was imported under a second name; the operators can exist only once
    library = torch.library.Library("fbitrain", "DEF")  # type: ignore[no-untyped-call]
    for op, signature, check, empty in (
        ("pack_signs", "(Tensor w) -> Tensor", _check_pack_signs, _empty_pack_signs),
        (
            "unpack_signs",
            "(Tensor words, SymInt k, ScalarType dtype) -> Tensor",
            _check_unpack_signs,
            _empty_unpack_signs,
        ),
        ("xnor_gemm", "(Tensor a, Tensor b, SymInt k) -> Tensor", _check_xnor_gemm, _empty_xnor_gemm),
        (
            "binary_linear",
            "(Tensor x, Tensor words, Tensor alpha, Tensor? beta, str scale, SymInt k, SymInt group_size) -> Tensor",
            _check_binary_linear,
            _empty_binary_linear,
        ),
    ):
        library.define(op + signature)  # type: ignore[no-untyped-call]
        run = _checked(check, _dispatched(op))
        library.impl(op, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fbitrain::{op}", _checked(check, empty), lib=library)
    torch.library.register_autograd("fbitrain::binary_linear", _refuse_backward, lib=library)
    return library


def _checked(check: Callable[..., None], then: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        check(*args)
        return then(*args)

    return call


def _dispatched(op: str) -> Callable[..., Tensor]:
    def call(first: Tensor, *args: Any) -> Tensor:
        chosen = select_backend(op, first.device.type, first.dtype).backend
        backend = next(backend for backend in BACKENDS[op] if backend.name == chosen)
        return backend.run(first, *args)

    return call


_LIBRARY = _define_operators()  # torch forgets the operators when this object goes away
