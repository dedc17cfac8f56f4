"""LatentLinear: what all layers that train low-bit weights have in common.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class LatentLinear(nn.Module, ABC):
    """A Linear that trains latent weights, of which forward uses only a low-bit form ŵ.

    Args:
        in_features, out_features: K and N.
        weight: start values [N, K] of the latent weight; None draws them, normal with standard deviation `init_std`.
        bias: start values [N] of a bias, which stays in full precision; None for a layer without one.
        device, dtype: of the parameters, as in torch.nn.Linear.

    Everything that reads whole weights outside forward happens in __init__: once it returns, ZeRO-3 may have
    partitioned them.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        init_std: float = 0.02,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", None if bias is None else nn.Parameter(self.weight.new_empty(out_features)))
        with torch.no_grad():
            if weight is None:
                self.weight.normal_(0.0, init_std)
            else:
                self.weight.copy_(weight)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """ŵ [N, K] in the weight's dtype, without a graph: forward is x ŵᵀ + bias. The parameters must be whole."""

    @abstractmethod
    def storage_bits(self) -> dict[str, int]:
        """Bits that ŵ takes in a release, by part (model/storage.py); their sum over N·K is the bits per weight."""

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
