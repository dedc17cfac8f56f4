"""The binary ops as torch operators `fbitrain::…`.

Call the functions here: they work in eager mode and under torch.compile, and check shapes and dtypes
(fbitrain.kernels.checks). fbitrain.kernels.dispatch says which implementation runs them. A weight is one argument
everywhere (fbitrain.kernels.weights) but in the operators' schemas, which know only tensors, numbers and strings.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens, E scaling experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels import checks
from fbitrain.kernels.dispatch import Call, runner
from fbitrain.kernels.layout import n_words
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight

Runs = Callable[..., Tensor]
Weight = BinaryWeight | MixtureWeight | PartialWeight


def pack_signs(w: Tensor) -> Tensor:
    """The signs of a float tensor w [..., K] as int32 words [..., Kw]; bit 1 means w >= 0."""
    return _operator("pack_signs")(w)


def unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """int32 words [..., Kw] as ±1 [..., k] of `dtype`."""
    return _operator("unpack_signs")(words, k, dtype)


def xnor_gemm(a: Tensor, b: Tensor, k: int) -> Tensor:
    """a bᵀ for packed ±1 matrices a [M, Kw] and b [N, Kw] of row length `k`: int32 [M, N], exact."""
    return _operator("xnor_gemm")(a, b, k)


def binary_linear(x: Tensor, weight: BinaryWeight, mode: str = "float") -> Tensor:
    """x [..., k] times ŵᵀ: [..., N] in x's dtype.

    mode "float" takes x as it is and sums in fp32 or wider; "int8" quantizes it per token, sums in integers, and raises
    ValueError if x holds NaN or infinity. For inference: backward raises.
    """
    return _operator("binary_linear")(x, *weight, mode)


def mixture_linear(x: Tensor, weight: MixtureWeight, mode: str = "float") -> Tensor:
    """((x ∘ (gates·alpha_in)) Sᵀ) ∘ (gates·alpha_out) for x [..., k] and the signs S of W: [..., N] in x's dtype.

    E goes from 1 to 64. Modes as in `binary_linear`; "int8" quantizes x ∘ (gates·alpha_in). For inference: backward
    raises.
    """
    return _operator("mixture_linear")(x, *weight, mode)


def partial_linear(x: Tensor, weight: PartialWeight, mode: str = "float") -> Tensor:
    """x [..., k] times ŵᵀ for a partially binarized weight: [..., N] in x's dtype.

    Modes as in `binary_linear`. Raises ValueError if the columns of a row do not ascend or leave the row. For
    inference: backward raises.
    """
    return _operator("partial_linear")(x, *weight, mode)


def _operator(op: str) -> Runs:
    operator: Runs = getattr(torch.ops.fbitrain, op)
    return operator


# What each op runs. The call says to `dispatch` all that it needs to know.


def _run_pack_signs(w: Tensor) -> Tensor:
    return runner(Call("pack_signs", w.device.type, w.dtype))(w)


def _run_unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return runner(Call("unpack_signs", words.device.type, dtype))(words, k, dtype)


def _run_xnor_gemm(a: Tensor, b: Tensor, k: int) -> Tensor:
    return runner(Call("xnor_gemm", a.device.type, a.dtype))(a, b, k)


def _run_linear(op: str) -> Runs:
    def run(x: Tensor, weight: Weight, mode: str = "float") -> Tensor:
        return runner(Call(op, x.device.type, x.dtype, weight.groups))(x, weight, mode)

    return run


# What each op returns, as an empty tensor: all that torch.compile needs to know (the "fake").


def _empty_pack_signs(w: Tensor) -> Tensor:
    return w.new_empty((*w.shape[:-1], n_words(w.shape[-1])), dtype=torch.int32)


def _empty_unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return words.new_empty((*words.shape[:-1], k), dtype=dtype)


def _empty_xnor_gemm(a: Tensor, b: Tensor, k: int) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


def _empty_linear(x: Tensor, weight: Weight, mode: str = "float") -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.words.shape[0]))


def _refuse_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("packed binary layers are for inference and have no backward; train the model with BinaryLinear")


# By operator: its arguments; the check; what it runs; what its fake returns.
_SIGN_OPS: dict[str, tuple[str, Callable[..., None], Runs, Runs]] = {
    "pack_signs": ("Tensor w", checks.check_pack_signs, _run_pack_signs, _empty_pack_signs),
    "unpack_signs": (
        *("Tensor words, SymInt k, ScalarType dtype", checks.check_unpack_signs),
        *(_run_unpack_signs, _empty_unpack_signs),
    ),
    "xnor_gemm": ("Tensor a, Tensor b, SymInt k", checks.check_xnor_gemm, _run_xnor_gemm, _empty_xnor_gemm),
}
# By operator: its arguments, x, the fields of the weight and the mode; the weight; the check.
_LINEAR_OPS: dict[str, tuple[str, type[Weight], Callable[..., None]]] = {
    "binary_linear": (
        "Tensor x, Tensor words, Tensor alpha, Tensor? beta, str scale, SymInt k, SymInt group_size, str mode='float'",
        *(BinaryWeight, checks.check_binary_linear),
    ),
    "mixture_linear": (
        "Tensor x, Tensor words, Tensor gates, Tensor alpha_in, Tensor alpha_out, SymInt k, str mode='float'",
        *(MixtureWeight, checks.check_mixture_linear),
    ),
    "partial_linear": (
        "Tensor x, Tensor words, Tensor alpha, str scale, Tensor row_starts, Tensor columns, Tensor values, "
        "Tensor? value_scale, SymInt k, SymInt group_size, str mode='float'",
        *(PartialWeight, checks.check_partial_linear),
    ),
}


def _define_operators() -> torch.library.Library | None:
    if hasattr(torch.ops.fbitrain, "binary_linear"):
        return None  # this file was imported under a second name; the operators can exist only once
    library = torch.library.Library("fbitrain", "DEF")  # type: ignore[no-untyped-call]

    def define(name: str, arguments: str, run: Runs, empty: Runs) -> None:
        op = library.define(f"{name}({arguments}) -> Tensor")  # type: ignore[no-untyped-call]
        library.impl(op, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fbitrain::{op}", empty, lib=library)

    for name, (arguments, check, *functions) in _SIGN_OPS.items():
        define(name, arguments, *(_checked(check, function) for function in functions))
    for name, (arguments, weight, check) in _LINEAR_OPS.items():
        define(name, arguments, *(_flat(weight, _checked(check, then)) for then in (_run_linear(name), _empty_linear)))
        torch.library.register_autograd(f"fbitrain::{name}", _refuse_backward, lib=library)
    return library


def _checked(check: Callable[..., None], then: Runs) -> Runs:
    def call(*args: Any) -> Tensor:
        check(*args)
        return then(*args)

    return call


def _flat(weight: type[Weight], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(x, weight, mode)` as torch calls an operator: with the weight's fields one by one, and without what
    equals its default in the schema."""
    n_fields = len(weight._fields)

    def call(x: Tensor, *arguments: Any) -> Any:
        return function(x, weight(*arguments[:n_fields]), *arguments[n_fields:])

    return call


_LIBRARY = _define_operators()  # torch forgets the operators when this object goes away
