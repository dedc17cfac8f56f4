"""The binary ops as torch operators `fbitrain::…`.

Call the functions here: they work in eager mode and under torch.compile, and check shapes and dtypes
(fbitrain.kernels.checks). fbitrain.kernels.dispatch says which implementation runs them.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens, G group size, E scaling experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels import checks, cpu
from fbitrain.kernels.dispatch import Call, backend_name, runner
from fbitrain.kernels.layout import n_words

Runs = Callable[..., Tensor]


def pack_signs(w: Tensor) -> Tensor:
    """The signs of a float tensor w [..., K] as int32 words [..., Kw]; bit 1 means w >= 0."""
    return _operator("pack_signs")(w)


def unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """int32 words [..., Kw] as ±1 [..., k] of `dtype`."""
    return _operator("unpack_signs")(words, k, dtype)


def interleave_signs(words: Tensor, k: int) -> Tensor | None:
    """A second copy of the bits of a weight, `words` int32 [N, Kw] on the CPU, for `binary_linear`: int32
    [`layout.interleaved_words`(N, k)], as many bytes again. With it both modes are about twice as fast for one token.

    None where nothing would be faster: on other devices and levels. It belongs to this process and is not to be saved.
    """
    checks.check_interleave_signs(words, k)
    backend = backend_name(Call("binary_linear", words.device.type, torch.float32))
    return cpu.interleave(backend, words, k) if backend in cpu.LEVELS else None


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
    interleaved: Tensor | None = None,
) -> Tensor:
    """x [..., k] times ŵᵀ for ŵ = α·sign(W) + β, the signs of W packed in `words` [N, Kw]; [..., N] in x's dtype.

    `alpha` and `beta` have the shape of `layout.scale_shape(scale, N, k, group_size)`. mode "float" takes x as it is
    and sums in fp32 or wider; "int8" quantizes it per token, sums in integers, and raises ValueError if x holds NaN or
    infinity. `interleaved`, what `interleave_signs` made of `words`, makes both faster for few tokens. It changes no
    result of "int8"; "float" then rounds x (times α under "column") to 24 bits of the token's largest magnitude, in
    place of its sums. For inference: backward raises.
    """
    arguments = (x, words, alpha, beta, scale, k, group_size, mode, interleaved)
    if _trains(x, alpha, beta):
        return _operator("binary_linear")(*arguments)
    if nobody_watches(x):
        checks.check_binary_linear(*arguments)
        return _run_binary_linear(*arguments)
    return _operator("binary_linear_inference")(*arguments)


def mixture_linear(
    x: Tensor, words: Tensor, gates: Tensor, alpha_in: Tensor, alpha_out: Tensor, k: int, mode: str = "float"
) -> Tensor:
    """((x ∘ (gates·alpha_in)) Sᵀ) ∘ (gates·alpha_out): token-dependent scales around the signs S of W (BinaryMoS,
    arXiv 2406.12311), packed in `words` [N, Kw].

    x [..., k]; gates fp32 [..., E], the router's softmax; alpha_in [E, k]; alpha_out [E, N]; E from 1 to 64. Returns
    [..., N] in x's dtype. Modes as in `binary_linear`; "int8" quantizes x ∘ (gates·alpha_in). For inference: backward
    raises.
    """
    arguments = (x, words, gates, alpha_in, alpha_out, k, mode)
    if _trains(x, gates, alpha_in, alpha_out):
        return _operator("mixture_linear")(*arguments)
    if nobody_watches(x) and nobody_watches(gates):
        checks.check_mixture_linear(*arguments)
        return _run_mixture_linear(*arguments)
    return _operator("mixture_linear_inference")(*arguments)


def partial_linear(
    x: Tensor,
    words: Tensor,
    alpha: Tensor,
    scale: str,
    row_starts: Tensor,
    columns: Tensor,
    values: Tensor,
    value_scale: Tensor | None,
    k: int,
    group_size: int,
    mode: str = "float",
) -> Tensor:
    """x [..., k] times ŵᵀ, [..., N] in x's dtype, for a weight that is α·sign(W) but for its salient entries (PB-LLM,
    arXiv 2310.00034).

    The signs are packed in `words` [N, Kw]; `alpha` belongs to scale "row" [N, 1] or "group" [N, k / group_size].
    The salient entries of row n are number row_starts[n] to row_starts[n + 1] - 1 (int32 [N + 1]) of `columns`
    (uint16, int32 if k > 65536; ascending within a row) and of `values`: int8, to be multiplied with `value_scale`
    (fp32 [N, 1]), or float16, with value_scale None. Their bits in `words` are ignored.

    Modes as in `binary_linear`. Raises ValueError if the columns of a row do not ascend or leave the row. For
    inference: backward raises.
    """
    arguments = (x, words, alpha, scale, row_starts, columns, values, value_scale, k, group_size, mode)
    if _trains(x, alpha, values, value_scale):
        return _operator("partial_linear")(*arguments)
    if nobody_watches(x):
        checks.check_partial_linear(*arguments)
        return _run_partial_linear(*arguments)
    return _operator("partial_linear_inference")(*arguments)


def nobody_watches(x: Tensor) -> bool:
    """Whether a function of x may be called without the dispatcher: nothing compiles, traces, transforms or intercepts
    it, and x is in memory what it is.

    A function registered from Python runs at half its speed inside the dispatcher. For one token and a small layer that
    is more than the kernel takes: measured on a busy machine, 50 µs a call instead of 33.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and not x.is_neg()  # the dispatcher carries out a lazy negation; memory does not show it
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _operator(op: str) -> Runs:
    operator: Runs = getattr(torch.ops.fbitrain, op)
    return operator


def _trains(*floats: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in floats)


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
    interleaved: Tensor | None = None,
) -> Tensor:
    call = Call("binary_linear", x.device.type, x.dtype, group_size if scale == "group" else 0)
    return runner(call)(x, words, alpha, beta, scale, k, group_size, mode, interleaved)


def _run_mixture_linear(
    x: Tensor, words: Tensor, gates: Tensor, alpha_in: Tensor, alpha_out: Tensor, k: int, mode: str = "float"
) -> Tensor:
    return runner(Call("mixture_linear", x.device.type, x.dtype))(x, words, gates, alpha_in, alpha_out, k, mode)


def _run_partial_linear(
    x: Tensor,
    words: Tensor,
    alpha: Tensor,
    scale: str,
    row_starts: Tensor,
    columns: Tensor,
    values: Tensor,
    value_scale: Tensor | None,
    k: int,
    group_size: int,
    mode: str = "float",
) -> Tensor:
    call = Call("partial_linear", x.device.type, x.dtype, group_size if scale == "group" else 0)
    return runner(call)(x, words, alpha, scale, row_starts, columns, values, value_scale, k, group_size, mode)


# What each op returns, as an empty tensor: all that torch.compile needs to know (the "fake").


def _empty_pack_signs(w: Tensor) -> Tensor:
    return w.new_empty((*w.shape[:-1], n_words(w.shape[-1])), dtype=torch.int32)


def _empty_unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    return words.new_empty((*words.shape[:-1], k), dtype=dtype)


def _empty_xnor_gemm(a: Tensor, b: Tensor, k: int) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[0]))


def _empty_linear(x: Tensor, words: Tensor, *scales_and_sizes: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]))


def _refuse_backward(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("packed binary layers are for inference and have no backward; train the model with BinaryLinear")


_LINEAR_SCHEMAS = {
    "binary_linear": (
        "Tensor x, Tensor words, Tensor alpha, Tensor? beta, str scale, SymInt k, SymInt group_size, str mode='float', "
        "Tensor? interleaved=None"
    ),
    "mixture_linear": (
        "Tensor x, Tensor words, Tensor gates, Tensor alpha_in, Tensor alpha_out, SymInt k, str mode='float'"
    ),
    "partial_linear": (
        "Tensor x, Tensor words, Tensor alpha, str scale, Tensor row_starts, Tensor columns, Tensor values, "
        "Tensor? value_scale, SymInt k, SymInt group_size, str mode='float'"
    ),
}


def _define_operators() -> torch.library.Library | None:
    if hasattr(torch.ops.fbitrain, "binary_linear"):
        return None  # this file was imported under a second name; the operators can exist only once
    library = torch.library.Library("fbitrain", "DEF")  # type: ignore[no-untyped-call]

    def define(name: str, arguments: str, check: Callable[..., None], run: Runs, empty: Runs) -> None:
        op = library.define(f"{name}({arguments}) -> Tensor")  # type: ignore[no-untyped-call]
        library.impl(op, _checked(check, run), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fbitrain::{op}", _checked(check, empty), lib=library)

    define("pack_signs", "Tensor w", checks.check_pack_signs, _run_pack_signs, _empty_pack_signs)
    define(
        "unpack_signs",
        "Tensor words, SymInt k, ScalarType dtype",
        checks.check_unpack_signs,
        _run_unpack_signs,
        _empty_unpack_signs,
    )
    define("xnor_gemm", "Tensor a, Tensor b, SymInt k", checks.check_xnor_gemm, _run_xnor_gemm, _empty_xnor_gemm)
    linear: dict[str, tuple[Callable[..., None], Runs]] = {
        "binary_linear": (checks.check_binary_linear, _run_binary_linear),
        "mixture_linear": (checks.check_mixture_linear, _run_mixture_linear),
        "partial_linear": (checks.check_partial_linear, _run_partial_linear),
    }
    for name, (check, run) in linear.items():
        # Twice: a backward that refuses is in Python too and slows down calls without gradients.
        define(name, _LINEAR_SCHEMAS[name], check, run, _empty_linear)
        define(f"{name}_inference", _LINEAR_SCHEMAS[name], check, run, _empty_linear)
        torch.library.register_autograd(f"fbitrain::{name}", _refuse_backward, lib=library)
    return library


def _checked(check: Callable[..., None], then: Runs) -> Runs:
    def call(*args: Any) -> Tensor:
        check(*args)
        return then(*args)

    return call


_LIBRARY = _define_operators()  # torch forgets the operators when this object goes away
