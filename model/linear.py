"""BinaryLinear: a Linear whose weights are one bit each, and its packed form.

The effective weight is ŵ = α·sign(W) + β (arXiv 2407.07093), W being the latent weight that training moves. The sum
α·S + β is never built: the scales multiply the input or the output of a product with S = sign(W). Backward keeps
nothing but x, W, α and β; S is made again.

Letters: N out_features, K in_features, M tokens, G group size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fbitrain.kernels import ops
from fbitrain.kernels.layout import n_words
from fbitrain.kernels.training import sign_matmul, sign_matmul_of_gradient
from fbitrain.model.binarize import init_scales, scale_shape, sign, ste_gradient
from fbitrain.model.config import STES

BLOCK_WEIGHTS = (
    2**22
)  # scale=group multiplies its scales into at most this many signs at a time (one row or group at least)


class BinaryLinear(nn.Module):
    """y = x ŵᵀ without bias, ŵ = α·sign(weight) + β; trains `weight` [N, K], `alpha` and `beta` (None if switched off).

    Args:
        in_features, out_features: K and N.
        scale: pattern of α and β: "column" [1, K], "row" [N, 1], "tensor" [1, 1], "group" [N, K / group_size] (no β).
        beta: learn the shift β.
        group_size: weights per scale along K; read for scale="group" only.
        ste: straight-through estimator of the weight's gradient, "identity" or "clip".
        weight: start values [N, K] of the latent weight; None draws them, normal with standard deviation `init_std`.
        device, dtype: of the parameters, as in torch.nn.Linear.

    x may have any leading shape and any float dtype; the product is computed in x's dtype. The gradients of α and β are
    summed over tokens in fp32.
    """

    beta: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: str = "column",
        beta: bool = True,
        group_size: int = 128,
        ste: str = "identity",
        weight: Tensor | None = None,
        init_std: float = 0.02,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale == "group" and beta:
            raise ValueError("scale='group' has no shift; beta must be False")
        if ste not in STES:
            raise ValueError(f"ste={ste!r} is unknown; choose {' or '.join(STES)}")
        self.in_features, self.out_features = in_features, out_features
        self.scale, self.group_size, self.ste = scale, group_size, ste
        shape = scale_shape(scale, out_features, in_features, group_size)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.register_parameter("beta", nn.Parameter(torch.empty_like(self.alpha)) if beta else None)
        # Everything that reads whole weights happens here: once __init__ returns, ZeRO-3 may have partitioned them.
        with torch.no_grad():
            if weight is None:
                self.weight.normal_(0.0, init_std)
            else:
                self.weight.copy_(weight)
        self.reset_scales()

    @torch.no_grad()
    def reset_scales(self) -> None:
        """Sets α and β from the weight as it is now (`init_scales`). The parameters must be whole, not partitioned."""
        alpha, beta = init_scales(self.weight, self.scale, self.beta is not None, self.group_size)
        self.alpha.copy_(alpha)
        if self.beta is not None and beta is not None:
            self.beta.copy_(beta)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        y: Tensor
        if self.scale == "column":
            y = _ColumnScaled.apply(x, self.weight, self.alpha, self.beta, self.ste)  # type: ignore[no-untyped-call]
        elif self.scale == "group":
            y = _GroupScaled.apply(x, self.weight, self.alpha, self.group_size, self.ste)  # type: ignore[no-untyped-call]
        else:
            y = _RowScaled.apply(x, self.weight, self.alpha, self.beta, self.ste)  # type: ignore[no-untyped-call]
        return y

    def extra_repr(self) -> str:
        return f"{_describe(self)}, ste={self.ste}"


class PackedBinaryLinear(nn.Module):
    """BinaryLinear for inference: one bit per weight, computed from the bits.

    Buffers: `weight_bits` int32 [N, ceil(K / 32)], `alpha` and `beta` (None if there is none) in fp32. They start as
    zeros, to be loaded from a state dict; `from_linear` fills them.
    """

    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, *, scale: str = "column", beta: bool = True, group_size: int = 128
    ) -> None:
        super().__init__()
        if scale == "group" and beta:
            raise ValueError("scale='group' has no shift; beta must be False")
        self.in_features, self.out_features = in_features, out_features
        self.scale, self.group_size = scale, group_size
        shape = scale_shape(scale, out_features, in_features, group_size)
        self.register_buffer("weight_bits", torch.zeros(out_features, n_words(in_features), dtype=torch.int32))
        self.register_buffer("alpha", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("beta", torch.zeros(shape, dtype=torch.float32) if beta else None)

    @classmethod
    def from_linear(cls, linear: BinaryLinear) -> PackedBinaryLinear:
        """The packed form of `linear`, on its device. Its parameters must be whole, not partitioned."""
        packed = cls(
            linear.in_features,
            linear.out_features,
            scale=linear.scale,
            beta=linear.beta is not None,
            group_size=linear.group_size,
        )
        packed.weight_bits = ops.pack_signs(linear.weight.detach())
        packed.alpha = linear.alpha.detach().to(torch.float32, copy=True)
        if linear.beta is not None:
            packed.beta = linear.beta.detach().to(torch.float32, copy=True)
        return packed.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        return ops.binary_linear(
            x, self.weight_bits, self.alpha, self.beta, self.scale, self.in_features, self.group_size
        )

    def extra_repr(self) -> str:
        return _describe(self)


class _ColumnScaled(torch.autograd.Function):
    """y = (x·α) Sᵀ + (x·β) 1ᵀ: the scales belong to the input's columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, ste: str) -> Tensor:
        ctx.save_for_backward(x, weight, alpha, beta)
        ctx.ste = ste
        x_MK = x.reshape(-1, x.shape[-1])
        y_MN = sign_matmul(x_MK * alpha.to(x.dtype), weight)
        if beta is not None:
            y_MN += x_MK @ beta.to(x.dtype).T
        return y_MN.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        needs_x, needs_weight, needs_alpha, needs_beta, _ = ctx.needs_input_grad
        dx = dweight = dalpha = dbeta = None
        x_MK, dy_MN, alpha_x = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), alpha.to(x.dtype)
        dy_sum = None if beta is None else dy_MN.sum(1, keepdim=True)
        if needs_x or needs_alpha:
            dscaled = sign_matmul_of_gradient(dy_MN, weight)  # the gradient of x·α
            if needs_alpha:
                dalpha = _token_sum(x_MK * dscaled).to(alpha.dtype)
            if needs_x:
                dx = dscaled.mul_(alpha_x)
                if dy_sum is not None:
                    dx.addcmul_(dy_sum, beta.to(x.dtype))
                dx = dx.reshape(x.shape)
        if needs_beta:
            dbeta = _token_sum(x_MK * dy_sum).to(beta.dtype)
        if needs_weight:
            dweight = ste_gradient((dy_MN.T @ (x_MK * alpha_x)).to(weight.dtype), weight, ctx.ste)
        return dx, dweight, dalpha, dbeta, None


class _RowScaled(torch.autograd.Function):
    """y = (x Sᵀ)·αᵀ + (Σx)·βᵀ: one scale per output row, or one for all ("tensor")."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, alpha: Tensor, beta: Tensor | None, ste: str) -> Tensor:
        ctx.save_for_backward(x, weight, alpha, beta)
        ctx.ste = ste
        x_MK = x.reshape(-1, x.shape[-1])
        y_MN = sign_matmul(x_MK, weight).mul_(alpha.to(x.dtype).T)
        if beta is not None:
            y_MN.addcmul_(x_MK.sum(1, keepdim=True), beta.to(x.dtype).T)
        return y_MN.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, alpha, beta = ctx.saved_tensors
        needs_x, needs_weight, needs_alpha, needs_beta, _ = ctx.needs_input_grad
        dx = dweight = dalpha = dbeta = None
        x_MK, dy_MN, alpha_x = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1]), alpha.to(x.dtype)
        if needs_x:
            dx = sign_matmul_of_gradient(dy_MN * alpha_x.T, weight)
            if beta is not None:
                dx += dy_MN @ beta.to(x.dtype).expand(weight.shape[0], 1)
            dx = dx.reshape(x.shape)
        if needs_weight or needs_alpha:
            dscaled = dy_MN.T @ x_MK  # the gradient of α·S
            if needs_alpha:
                dalpha = (dscaled * sign(weight).to(x.dtype)).sum(1, keepdim=True, dtype=_wide(x.dtype))
                dalpha = dalpha.sum_to_size(alpha.shape).to(alpha.dtype)
            if needs_weight:
                dweight = ste_gradient(dscaled.mul_(alpha_x).to(weight.dtype), weight, ctx.ste)
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
                dalpha = signs.mul_(dscaled).sum(2, dtype=_wide(x.dtype)).to(alpha.dtype)
            if needs_weight:
                dscaled = dscaled.mul_(alpha.to(x.dtype).unsqueeze(2)).flatten(1)
                dweight = ste_gradient(dscaled.to(weight.dtype), weight, ctx.ste)
        return dx, dweight, dalpha, None, None


def _describe(layer: BinaryLinear | PackedBinaryLinear) -> str:
    group = f", group_size={layer.group_size}" if layer.scale == "group" else ""
    return f"{layer.in_features}, {layer.out_features}, scale={layer.scale}{group}, beta={layer.beta is not None}"


def _scaled_signs(weight: Tensor, alpha: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """α·sign(weight) of a block: weight [n, k], alpha [n, k / group_size]."""
    signs = torch.unflatten(sign(weight).to(dtype), 1, (-1, group_size))
    return signs.mul_(alpha.to(dtype).unsqueeze(2)).flatten(1)


def _blocks(count: int, weights_each: int) -> Iterator[slice]:
    """Cuts `count` rows or groups of `weights_each` weights into slices of at most BLOCK_WEIGHTS weights."""
    step = max(1, BLOCK_WEIGHTS // weights_each)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _token_sum(terms: Tensor) -> Tensor:
    """[M, C] -> [1, C], summed in fp32 or wider."""
    return terms.sum(0, keepdim=True, dtype=_wide(terms.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
