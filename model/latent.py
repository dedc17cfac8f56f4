"""LatentLinear: what all layers that train low-bit weights have in common.

Letters: N out_features, K in_features, λ the binary share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbitrain.model.config import BinarizeConfig, method_settings

if TYPE_CHECKING:
    from fbitrain.model.packing import StoredLayer

FULL, MIXED, BINARY = "full precision", "mixed", "binary"


class LatentLinear(nn.Module, ABC):
    """A Linear that trains latent weights, of which forward uses only a low-bit form ŵ.

    In a run with phases of precision (model/phases.py) forward is (1 - λ)·x weightᵀ + λ·product(x) + bias. λ is 1
    unless `set_binary_share` says otherwise; it is no part of the state dict.

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
        self.phase = BINARY  # or FULL, or MIXED
        # Not a buffer, which DeepSpeed would cast to bf16. A tensor and not a float, so that torch.compile takes it as
        # an input and does not compile anew for every value.
        self._share: Tensor | None = None
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.register_parameter("bias", None if bias is None else nn.Parameter(self.weight.new_empty(out_features)))
        with torch.no_grad():
            if weight is None:
                self.weight.normal_(0.0, init_std)
            else:
                self.weight.copy_(weight)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)

    @classmethod
    def make(cls, binarize: BinarizeConfig, mask: Tensor | None, latent: dict[str, Any]) -> LatentLinear:
        """The layer that `binarize` asks for: its constructor gets what the table of methods says it reads.

        mask: bool [N, K], True for salient weights; None for methods without them. latent: this class's own arguments.
        """
        return cls(**method_settings(binarize), **latent)

    @staticmethod
    @abstractmethod
    def pack(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> StoredLayer:
        """The release's form of a layer that `make` built, from what its checkpoint holds; see packing.pack_layer."""

    def set_binary_share(self, share: float) -> None:
        """Sets λ in [0, 1]: 0 is an ordinary Linear, 1 a low-bit layer."""
        if not 0 <= share <= 1:
            raise ValueError(f"a share of {share} does not lie in 0 to 1")
        self.phase = FULL if share == 0 else BINARY if share == 1 else MIXED
        if self._share is None:  # on the CPU, from where any device takes a scalar
            self._share = torch.full((), share, dtype=torch.float32, device="cpu")
        else:
            self._share.fill_(share)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, under autocast in autocast's, as torch.nn.Linear.

        Autocast ends here: x is cast, and the products in it, whose backward passes are written out, are computed as
        for an x of that dtype.
        """
        kind = x.device.type
        if not torch.is_autocast_enabled(kind):
            return self._forward(x)
        x = x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(kind))  # torch leaves doubles alone, too
        with torch.autocast(kind, enabled=False):
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.phase == FULL:
            return F.linear(x, self.weight.to(x.dtype), bias)
        y = self.product(x)
        if self.phase == MIXED:
            assert self._share is not None
            y = F.linear(x, self.weight.to(x.dtype)) * (1 - self._share) + y * self._share
        return y if bias is None else y + bias

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> x ŵᵀ [..., N] in x's dtype."""

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """What forward multiplies x with, [N, K] in the weight's dtype, without a graph: (1 - λ)·weight + λ·ŵ.

        The parameters must be whole.
        """
        if self.phase == FULL:
            return self.weight.detach().clone()
        binary = self.binary_weight()
        if self.phase == BINARY:
            return binary
        assert self._share is not None
        return self.weight * (1 - self._share) + binary * self._share

    @abstractmethod
    def binary_weight(self) -> Tensor:
        """ŵ [N, K] in the weight's dtype, without a graph. The parameters must be whole."""

    def start_scales(self, weight: Tensor) -> dict[str, Tensor]:
        """Start values of the learned scales, by parameter, for the whole latent weight [N, K]; {} if there are none.

        A layer has them from its first weight; in a run that begins in full precision, again when that phase ends.
        """
        return {}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
