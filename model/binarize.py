"""From latent weights to bits and scales: pure functions.

The effective weight is ŵ = α·sign(W) + β. Letters: N out_features, K in_features, G group size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fbitrain.kernels.layout import scale_shape
from fbitrain.kernels.reference import sign

__all__ = ["init_scales", "scale_shape", "sign", "sign_ste", "ste_gradient", "wide", "with_slope"]


def ste_gradient(grad: Tensor, w: Tensor, ste: str) -> Tensor:
    """The gradient of W given that of sign(W), by straight-through estimator.

    `identity` passes it unchanged (FBI-LLM, arXiv 2407.07093); `clip` drops it where |w| > 1, so that a weight which is
    already sure of its sign is not pushed further out (Hubara et al., arXiv 1602.02830).
    """
    if ste == "identity":
        return grad
    if ste == "clip":
        return grad.masked_fill(w.abs() > 1, 0)
    raise ValueError(f"ste={ste!r} is unknown; choose identity or clip")


def sign_ste(w: Tensor, ste: str) -> Tensor:
    """sign(w) with the gradient of `ste_gradient`; same shape and dtype as w."""
    signs: Tensor = _SignSTE.apply(w, ste)  # type: ignore[no-untyped-call]
    return signs


def with_slope(value: Tensor, w: Tensor, slope: Callable[[], Tensor] | None = None) -> Tensor:
    """`value` in w's dtype and shape, whose gradient passes to w, times what `slope` gives (None: unchanged).

    `slope` is called in backward only; what it gives is a constant.
    """
    result: Tensor = _WithSlope.apply(value, w, slope)  # type: ignore[no-untyped-call]
    return result


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of tensors of `dtype` are computed: fp32 or wider."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def init_scales(w_NK: Tensor, scale: str, beta: bool, group_size: int) -> tuple[Tensor, Tensor | None]:
    """Start values (α, β) for a weight, in its dtype and of the shape that `scale_shape` names.

    β is the mean of W and α the mean of |W - β| over the dimensions the pattern reduces, the least-squares fit of
    α·sign(W - β) + β (arXiv 2407.07093). Without β, it is 0 in both.
    """
    n, k = w_NK.shape
    shape = scale_shape(scale, n, k, group_size)
    if scale == "group":
        if beta:
            raise ValueError("scale='group' has no shift; beta must be False")
        return torch.unflatten(w_NK.abs(), 1, (-1, group_size)).mean(2), None
    dims = [dim for dim in (0, 1) if shape[dim] == 1]
    if not beta:
        return w_NK.abs().mean(dims, keepdim=True), None
    shift = w_NK.mean(dims, keepdim=True)
    return (w_NK - shift).abs().mean(dims, keepdim=True), shift


class _SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, w: Tensor, ste: str) -> Tensor:
        ctx.save_for_backward(w)
        ctx.ste = ste  # type: ignore[attr-defined]
        return sign(w)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return ste_gradient(grad, w, ctx.ste), None  # type: ignore[attr-defined]


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, value: Tensor, w: Tensor, slope: Callable[[], Tensor] | None
    ) -> Tensor:
        ctx.slope = slope  # type: ignore[attr-defined]
        return value.to(w.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[None, Tensor, None]:
        slope = ctx.slope  # type: ignore[attr-defined]
        return None, grad if slope is None else (grad * slope()).to(grad.dtype), None
