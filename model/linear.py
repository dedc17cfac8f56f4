"""BinaryLinear: a Linear whose weights are one bit each.

The effective weight is ŵ = α·sign(W) + β (arXiv 2407.07093), W being the latent weight that training moves.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fbitrain.kernels.ops import pack_signs
from fbitrain.model.binarize import init_scales, scale_shape, sign
from fbitrain.model.config import STES, BinarizeConfig
from fbitrain.model.latent import LatentLinear
from fbitrain.model.packing import Levels, StoredLayer, sign_options
from fbitrain.model.scaled_product import scaled_product


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

    @staticmethod
    def pack(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> StoredLayer:
        """See LatentLinear."""
        levels = Levels.of(trained["alpha"], trained.get("beta"), dtype)
        tensors = {"weight_bits": pack_signs(trained["weight"]), "alpha": levels.alpha}
        if "beta" in trained:
            tensors["beta"] = levels.beta
        return StoredLayer("binary", sign_options(binarize.scale, "beta" in trained, binarize.group_size), tensors)

    @torch.no_grad()
    def reset_scales(self) -> None:
        """Sets α and β from the weight as it is now (`init_scales`). The parameters must be whole, not partitioned."""
        for name, values in self.start_scales(self.weight).items():
            self.get_parameter(name).copy_(values)

    def start_scales(self, weight: Tensor) -> dict[str, Tensor]:
        """α and β for a weight."""
        alpha, beta = init_scales(weight, self.scale, self.beta is not None, self.group_size)
        return {"alpha": alpha} if beta is None else {"alpha": alpha, "beta": beta}

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> x ŵᵀ [..., N] in x's dtype."""
        return scaled_product(x, self.weight, self.alpha, self.beta, self.scale, self.group_size, self.ste)

    @torch.no_grad()
    def binary_weight(self) -> Tensor:
        """ŵ [N, K] in the weight's dtype, without a graph. The parameters must be whole."""
        alpha = self.alpha.repeat_interleave(self.group_size, dim=1) if self.scale == "group" else self.alpha
        scaled = alpha * sign(self.weight)
        return scaled if self.beta is None else scaled + self.beta

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.scale == "group" else ""
        return f"{super().extra_repr()}, scale={self.scale}{group}, beta={self.beta is not None}, ste={self.ste}"
