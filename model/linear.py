"""BinaryLinear: a Linear whose weights are one bit each, and its packed form.

The effective weight is ŵ = α·sign(W) + β (arXiv 2407.07093), W being the latent weight that training moves.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fbitrain.kernels import ops
from fbitrain.kernels.layout import n_words
from fbitrain.model.binarize import init_scales, scale_shape, sign
from fbitrain.model.config import STES
from fbitrain.model.latent import LatentLinear
from fbitrain.model.scaled_product import scaled_product
from fbitrain.model.storage import sign_storage


class BinaryLinear(LatentLinear):
    """y = x ŵᵀ + bias, ŵ = α·sign(weight) + β; trains `weight` [N, K], `alpha` and `beta` (None if switched off).

    Args, beyond those of LatentLinear:
        scale: pattern of α and β: "column" [1, K], "row" [N, 1], "tensor" [1, 1], "group" [N, K / group_size] (no β).
        beta: learn the shift β.
        group_size: weights per scale along K; read for scale="group" only.
        ste: straight-through estimator of the weight's gradient, "identity" or "clip".

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
        **latent: Any,
    ) -> None:
        if scale == "group" and beta:
            raise ValueError("scale='group' has no shift; beta must be False")
        if ste not in STES:
            raise ValueError(f"ste={ste!r} is unknown; choose {' or '.join(STES)}")
        shape = scale_shape(scale, out_features, in_features, group_size)
        super().__init__(in_features, out_features, **latent)
        self.scale, self.group_size, self.ste = scale, group_size, ste
        self.alpha = nn.Parameter(self.weight.new_empty(shape))
        self.register_parameter("beta", nn.Parameter(torch.empty_like(self.alpha)) if beta else None)
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
        y = scaled_product(x, self.weight, self.alpha, self.beta, self.scale, self.group_size, self.ste)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """ŵ [N, K] in the weight's dtype, without a graph. The parameters must be whole."""
        alpha = self.alpha.repeat_interleave(self.group_size, dim=1) if self.scale == "group" else self.alpha
        scaled = alpha * sign(self.weight)
        return scaled if self.beta is None else scaled + self.beta

    def storage_bits(self) -> dict[str, int]:
        """Bits of the signs and of α and β."""
        n_scales = self.alpha.numel() * (1 if self.beta is None else 2)
        return sign_storage(self.out_features, self.in_features, n_scales)

    def extra_repr(self) -> str:
        return f"{_describe(self)}, ste={self.ste}"


class PackedBinaryLinear(nn.Module):
    """BinaryLinear for inference: one bit per weight, computed from the bits.

    Buffers: `weight_bits` int32 [N, ceil(K / 32)], `alpha`, `beta` and `bias` [N] (None if there is none) in fp32. They
    start as zeros, to be loaded from a state dict; `from_linear` fills them.
    """

    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: str = "column",
        beta: bool = True,
        group_size: int = 128,
        bias: bool = False,
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
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)

    @classmethod
    def from_linear(cls, linear: BinaryLinear) -> PackedBinaryLinear:
        """The packed form of `linear`, on its device. Its parameters must be whole, not partitioned."""
        packed = cls(
            linear.in_features,
            linear.out_features,
            scale=linear.scale,
            beta=linear.beta is not None,
            group_size=linear.group_size,
            bias=linear.bias is not None,
        )
        packed.weight_bits = ops.pack_signs(linear.weight.detach())
        packed.alpha = linear.alpha.detach().to(torch.float32, copy=True)
        if linear.beta is not None:
            packed.beta = linear.beta.detach().to(torch.float32, copy=True)
        if linear.bias is not None:
            packed.bias = linear.bias.detach().to(torch.float32, copy=True)
        return packed.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        y = ops.binary_linear(x, self.weight_bits, self.alpha, self.beta, self.scale, self.in_features, self.group_size)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return _describe(self)


def _describe(layer: BinaryLinear | PackedBinaryLinear) -> str:
    group = f", group_size={layer.group_size}" if layer.scale == "group" else ""
    bias = ", bias=True" if layer.bias is not None else ""
    return f"{layer.in_features}, {layer.out_features}, scale={layer.scale}{group}, beta={layer.beta is not None}{bias}"
