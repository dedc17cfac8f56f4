"""The binary ops as torch operators `fbitrain::…`.

Call the functions here: they work in eager mode and under torch.compile, and check shapes and dtypes
(fbitrain.kernels.checks). fbitrain.kernels.dispatch says which implementation runs them.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens, G group size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels import checks
from fbitrain.kernels.dispatch import Call, runner
from fbitrain.kernels.layout import n_words


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
    x: Tensor,
    words: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    scale: str,
    k: int,
    group_size: int,
    mode: str = "float",
) -> Tensor:
    """x [..., k] times ŵᵀ for ŵ = α·sign(W) + β, the signs of W packed in `words` [N, Kw]; [..., N] in x's dtype.

    `alpha` and `beta` have the shape of `layout.scale_shape(scale, N, k, group_size)`. mode "float" takes x as it is
    and sums in fp32 or wider; "int8" quantizes it per token, sums in integers, and raises ValueError if x holds NaN or
    infinity. For inference: backward raises.
    """
    arguments = (x, words, alpha, beta, scale, k, group_size, mode)
    if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad):
        return _operator("binary_linear")(*arguments)
    if _nobody_watches(x):
        checks.check_binary_linear(*arguments)
        return _run_binary_linear(*arguments)
    return _operator("binary_linear_inference")(*arguments)


def _nobody_watches(x: Tensor) -> bool:
    """Whether the function may be called without the dispatcher: nothing compiles, traces, transforms or intercepts it.

    A function registered from Python runs at half its speed inside the dispatcher. For one token and a small layer that
    is more than the kernel takes: measured on a busy machine, 50 µs a call instead of 33.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _operator(op: str) -> Callable[..., Tensor]:
    operator: Callable[..., Tensor] = getattr(torch.ops.fbitrain, op)
    return operator


# What each op runs. The call says to `dispatch` all that it needs to know.


def _run_pack_signs(w: Tensor) -> Tensor:
    return runner(Call("pack_signs", w.device.type, w.dtype))(w)


def _run_unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return runner(Call("unpack_signs", words.device.type, dtype))(words, k, dtype)


def _run_xnor_gemm(a: Tensor, b: Tensor, k: int) -> Tensor:
    return runner(Call("xnor_gemm", a.device.type, a.dtype))(a, b, k)


def _run_binary_linear(
    x: Tensor,
    words: Tensor,
    alpha: Tensor,
    beta: Tensor | None,
    scale: str,
    k: int,
    group_size: int,
    mode: str = "float",
) -> Tensor:
    call = Call("binary_linear", x.device.type, x.dtype, group_size if scale == "group" else 0)
    return runner(call)(x, words, alpha, beta, scale, k, group_size, mode)


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
    arguments = (
        "Tensor x, Tensor words, Tensor alpha, Tensor? beta, str scale, SymInt k, SymInt group_size, str mode='float'"
    )
    linear = (checks.check_binary_linear, _run_binary_linear, _empty_binary_linear)
    for signature, check, run, empty in (
        ("pack_signs(Tensor w) -> Tensor", checks.check_pack_signs, _run_pack_signs, _empty_pack_signs),
        (
            "unpack_signs(Tensor words, SymInt k, ScalarType dtype) -> Tensor",
            checks.check_unpack_signs,
            _run_unpack_signs,
            _empty_unpack_signs,
        ),
        (
            "xnor_gemm(Tensor a, Tensor b, SymInt k) -> Tensor",
            checks.check_xnor_gemm,
            _run_xnor_gemm,
            _empty_xnor_gemm,
        ),
        (f"binary_linear({arguments}) -> Tensor", *linear),
        # The same without a backward that refuses, which is in Python too and slows down calls without gradients.
        (f"binary_linear_inference({arguments}) -> Tensor", *linear),
    ):
        op = library.define(signature)  # type: ignore[no-untyped-call]
        library.impl(op, _checked(check, run), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fbitrain::{op}", _checked(check, empty), lib=library)
    torch.library.register_autograd("fbitrain::binary_linear", _refuse_backward, lib=library)
    return library


def _checked(check: Callable[..., None], then: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        check(*args)
        return then(*args)

    return call


_LIBRARY = _define_operators()  # torch forgets the operators when this object goes away
