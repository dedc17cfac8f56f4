"""Products with α·sign(W) + β, for each pattern of α and β.

The sum α·S + β is never built: the scales multiply the input or the output of a product with S = sign(W). Backward
keeps nothing but x, W, α and β; S is made again.

Letters: N out_features, K in_features, M tokens, G group size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fbitrain.kernels.training import sign_matmul, sign_matmul_of_gradient
from fbitrain.model.binarize import sign, ste_gradient, wide

BLOCK_WEIGHTS = (
    2**22
)  # scale=group multiplies its scales into at most this many signs at a time (one row or group at least)


def scaled_product(
    x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, scale: str, group_size: int, ste: str
) -> Tensor:
    """x ŵᵀ for x [..., K], in x's dtype; weight [N, K], alpha and beta as `layout.scale_shape` has them.

    The gradients of α and β are summed over tokens in fp32 or wider.
    """
    y: Tensor
    if scale == "column":
        y = _ColumnScaled.apply(x, weight, alpha, beta, ste)  # type: ignore[no-untyped-call]
    elif scale == "group":
        y = _GroupScaled.apply(x, weight, alpha, group_size, ste)  # type: ignore[no-untyped-call]
    else:
        y = _RowScaled.apply(x, weight, alpha, beta, ste)  # type: ignore[no-untyped-call]
    return y


class _ColumnScaled(torch.autograd.Function):
    """y = (x·α) Sᵀ + (x·β) 1ᵀ: the scales belong to the input's columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, ste: str) -> Tensor:
        ctx.save_for_backward(x, weight, alpha, beta)
        ctx.ste = ste
        x_MK = x.reshape(-1, x.shape[-1])
        shift_M1 = None if beta is None else x_MK @ beta.to(x.dtype).T
        y_MN = sign_matmul(_times(x_MK, alpha), weight, add=shift_M1)
        return y_MN.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        needs_x, needs_weight, needs_alpha, needs_beta, _ = ctx.needs_input_grad
        dx = dweight = dalpha = dbeta = None
        x_MK, dy_MN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dy_sum = None if beta is None else dy_MN.sum(1, keepdim=True)
        if needs_x or needs_alpha:
            dscaled = sign_matmul_of_gradient(dy_MN, weight)  # the gradient of x·α
            if needs_alpha:
                dalpha = _token_sum(x_MK * dscaled).to(alpha.dtype)
            if needs_x:
                dx = dscaled.mul_(alpha)
                if dy_sum is not None:
                    dx.addcmul_(dy_sum, beta.to(x.dtype))
                dx = dx.reshape(x.shape)
        if needs_beta:
            dbeta = _token_sum(x_MK * dy_sum).to(beta.dtype)
        if needs_weight:
            dweight = ste_gradient((dy_MN.T @ _times(x_MK, alpha)).to(weight.dtype), weight, ctx.ste)
        return dx, dweight, dalpha, dbeta, None


class _RowScaled(torch.autograd.Function):
    """y = (x Sᵀ)·αᵀ + (Σx)·βᵀ: one scale per output row, or one for all ("tensor")."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, ste: str) -> Tensor:
        ctx.save_for_backward(x, weight, alpha, beta)
        ctx.ste = ste
        x_MK = x.reshape(-1, x.shape[-1])
        y_MN = sign_matmul(x_MK, weight).mul_(alpha.T)
        if beta is not None:
            y_MN.addcmul_(x_MK.sum(1, keepdim=True), beta.to(x.dtype).T)
        return y_MN.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        needs_x, needs_weight, needs_alpha, needs_beta, _ = ctx.needs_input_grad
        dx = dweight = dalpha = dbeta = None
        x_MK, dy_MN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        if needs_x:
            dx = sign_matmul_of_gradient(_times(dy_MN, alpha.T), weight)
            if beta is not None:
                dx += dy_MN @ beta.to(x.dtype).expand(weight.shape[0], 1)
            dx = dx.reshape(x.shape)
        if needs_weight or needs_alpha:
            dscaled = dy_MN.T @ x_MK  # the gradient of α·S
            if needs_alpha:
                dalpha = (dscaled * sign(weight).to(x.dtype)).sum(1, keepdim=True, dtype=wide(x.dtype))
                dalpha = dalpha.sum_to_size(alpha.shape).to(alpha.dtype)
            if needs_weight:
                dweight = ste_gradient(dscaled.to(weight.dtype).mul_(alpha), weight, ctx.ste)
        if needs_beta:
            dbeta = _token_sum(dy_MN * x_MK.sum(1, keepdim=True)).T.sum_to_size(beta.shape).to(beta.dtype)
        return dx, dweight, dalpha, dbeta, None


class _GroupScaled(torch.autograd.Function):
    """y = x (α·S)ᵀ with one α per row and group of G columns.

    Such an α fits neither side of the product, so it multiplies the signs, a block of rows at a time (backward: a block
    of groups, so that no two blocks add to the same element of dx).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, alpha: Tensor, group_size: int, ste: str) -> Tensor:
        ctx.save_for_backward(x, weight, alpha)
        ctx.group_size, ctx.ste = group_size, ste
        x_MK = x.reshape(-1, x.shape[-1])
        y_MN = x.new_empty(x_MK.shape[0], weight.shape[0])
        for rows in _blocks(*weight.shape):
            y_MN[:, rows] = x_MK @ _scaled_signs(weight[rows], alpha[rows], group_size, x.dtype).T
        return y_MN.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha = ctx.saved_tensors
        size = ctx.group_size
        needs_x, needs_weight, needs_alpha, *_ = ctx.needs_input_grad
        dx = dweight = dalpha = None
        x_MK, dy_MN = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        if needs_x:
            dx_MK = torch.empty_like(x_MK)
            for groups in _blocks(alpha.shape[1], size * weight.shape[0]):
                columns = slice(groups.start * size, groups.stop * size)
                dx_MK[:, columns] = dy_MN @ _scaled_signs(weight[:, columns], alpha[:, groups], size, x.dtype)
            dx = dx_MK.reshape(x.shape)
        if needs_weight or needs_alpha:
            dscaled = torch.unflatten(dy_MN.T @ x_MK, 1, (-1, size))  # the gradient of α·S, [N, K/G, G]
            if needs_alpha:
                signs = sign(weight).to(x.dtype).view_as(dscaled)
                dalpha = signs.mul_(dscaled).sum(2, dtype=wide(x.dtype)).to(alpha.dtype)
            if needs_weight:
                dscaled = dscaled.to(weight.dtype).mul_(alpha.unsqueeze(2)).flatten(1)
                dweight = ste_gradient(dscaled, weight, ctx.ste)
        return dx, dweight, dalpha, None, None


def _scaled_signs(weight: Tensor, alpha: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """α·sign(weight) of a block: weight [n, k], alpha [n, k / group_size]."""
    signs = torch.unflatten(sign(weight).to(dtype), 1, (-1, group_size))
    return signs.mul_(alpha.to(dtype).unsqueeze(2)).flatten(1)


def _blocks(count: int, weights_each: int) -> Iterator[slice]:
    """Cuts `count` rows or groups of `weights_each` weights into slices of at most BLOCK_WEIGHTS weights."""
    step = max(1, BLOCK_WEIGHTS // weights_each)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _times(x: Tensor, scale: Tensor) -> Tensor:
    """x·scale in x's dtype, computed in the wider of the two and rounded once."""
    return torch.mul(x, scale, out=torch.empty_like(x))


def _token_sum(terms: Tensor) -> Tensor:
    """[M, C] -> [1, C], summed in fp32 or wider."""
    return terms.sum(0, keepdim=True, dtype=wide(terms.dtype))
