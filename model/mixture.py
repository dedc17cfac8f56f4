"""Binary layers with a scale for every input and every output: OneBitLinear and MixtureOfScalesLinear.

OneBit (arXiv 2402.11295) gives a sign matrix one vector of scales on either side. BinaryMoS (arXiv 2406.12311) has E
such pairs, experts, and mixes them anew for each token by a router. Both start from the best rank-1 approximation of
|W|.

Letters: N out_features, K in_features, M tokens, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbitrain.kernels.ops import pack_signs
from fbitrain.model.binarize import sign, sign_ste, wide
from fbitrain.model.config import MAX_EXPERTS, STES, BinarizeConfig
from fbitrain.model.latent import LatentLinear
from fbitrain.model.packing import StoredLayer, rounded
from fbitrain.model.recomputed import recomputed_linear
from fbitrain.model.scaled_product import scaled_product

POWER_ITERATIONS = 32


class OneBitLinear(LatentLinear):
    """y = ((x·scale_in) Sᵀ)·scale_out + bias, S = sign(weight); trains scale_in [1, K] and scale_out [1, N].

    Args, beyond those of LatentLinear:
        ste: straight-through estimator of the weight, "identity" or "clip".
        output_norm: OneBit's LayerNorm: each token's y, before the bias, is brought to mean 0 and variance 1. It has no
            weights. The layer is then no Linear: no ŵ serves every token.
    """

    def __init__(
        self, in_features: int, out_features: int, *, ste: str = "identity", output_norm: bool = False, **latent: Any
    ) -> None:
        super().__init__(in_features, out_features, **latent)
        self.ste, self.output_norm = _checked_ste(ste), output_norm
        scales = self.start_scales(self.weight)
        self.scale_in = nn.Parameter(scales["scale_in"].to(self.weight.dtype))
        self.scale_out = nn.Parameter(scales["scale_out"].to(self.weight.dtype))

    @staticmethod
    def pack(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> StoredLayer:
        """See LatentLinear."""
        signs = {"weight_bits": pack_signs(trained["weight"])}
        options = {"output_norm": True} if binarize.output_norm else {}
        return StoredLayer("onebit", options, signs | rounded(trained, dtype, "scale_in", "scale_out"))

    def start_scales(self, weight: Tensor) -> dict[str, Tensor]:
        """The two vectors of scales for a weight."""
        return dict(zip(("scale_in", "scale_out"), rank_one(weight), strict=True))

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> x ŵᵀ [..., N], normed if asked for, in x's dtype."""
        x_MK = x.reshape(-1, self.in_features)
        y_MN = scaled_product(x_MK, self.weight, self.scale_in, None, "column", 0, self.ste)
        y_MN = y_MN * self.scale_out.to(x.dtype)
        y_MN = F.layer_norm(y_MN, (self.out_features,)) if self.output_norm else y_MN
        return y_MN.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def binary_weight(self) -> Tensor:
        """ŵ [N, K] in the weight's dtype, without a graph. The parameters must be whole.

        Raises ValueError for a layer with output_norm.
        """
        if self.output_norm:
            raise ValueError("behind a norm the effective weight depends on the token; use forward")
        return sign(self.weight) * self.scale_in * self.scale_out.T

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, ste={self.ste}, output_norm={self.output_norm}"


class MixtureOfScalesLinear(LatentLinear):
    """y = ((x·(g scale_in)) Sᵀ)·(g scale_out) + bias with g = softmax(x routerᵀ), one mixture of experts per token.

    Trains `weight` [N, K], `scale_in` [E, K], `scale_out` [E, N] and `router` [E, K]. All experts start from the same
    two vectors; the router starts uniform in ±1/√K, as torch's Linear does, and its differing rows give the experts
    different gradients from the first step on (BinaryMoS's released code does the same).

    Args, beyond those of LatentLinear:
        n_experts: E, 1 to 64.
        ste: straight-through estimator of the weight, "identity" or "clip" (BinaryMoS's).

    The softmax and the mixtures of scales are computed in fp32, the products with x in its dtype.
    """

    def __init__(
        self, in_features: int, out_features: int, *, n_experts: int = 4, ste: str = "clip", **latent: Any
    ) -> None:
        if not 1 <= n_experts <= MAX_EXPERTS:
            raise ValueError(f"n_experts={n_experts} must be from 1 to {MAX_EXPERTS}")
        super().__init__(in_features, out_features, **latent)
        self.n_experts, self.ste = n_experts, _checked_ste(ste)
        scales = self.start_scales(self.weight)
        self.scale_in = nn.Parameter(scales["scale_in"].to(self.weight.dtype))
        self.scale_out = nn.Parameter(scales["scale_out"].to(self.weight.dtype))
        bound = 1 / math.sqrt(in_features)
        self.router = nn.Parameter(self.weight.new_empty(n_experts, in_features).detach().uniform_(-bound, bound))
        # Not a buffer, which DeepSpeed would cast to bf16 and which state dicts would have to leave out.
        self._router_stats: Tensor | None = None

    @staticmethod
    def pack(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> StoredLayer:
        """See LatentLinear."""
        signs = {"weight_bits": pack_signs(trained["weight"])}
        tensors = signs | rounded(trained, dtype, "scale_in", "scale_out", "router")
        return StoredLayer("mixture", {"n_experts": len(trained["router"])}, tensors)

    def start_scales(self, weight: Tensor) -> dict[str, Tensor]:
        """The scales of all experts for a weight: the same two vectors for each."""
        names = ("scale_in", "scale_out")
        return {name: s.repeat(self.n_experts, 1) for name, s in zip(names, rank_one(weight), strict=True)}

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> the mixed product [..., N] in x's dtype. In training mode the router's choices are counted."""
        gates = torch.softmax(recomputed_linear(x, _same, self.router), dim=-1, dtype=wide(x.dtype))
        if self.training:
            self._count(gates.detach())
        scale_in, scale_out = (
            recomputed_linear(gates, torch.t, scale).to(x.dtype) for scale in (self.scale_in, self.scale_out)
        )
        return recomputed_linear(x * scale_in, partial(sign_ste, ste=self.ste), self.weight) * scale_out

    def binary_weight(self) -> Tensor:
        """There is none: raises ValueError."""
        raise ValueError("the effective weight of a mixture of scales depends on the token; use forward")

    def take_router_stats(self) -> Tensor:
        """fp32 [E + 2], counted since the last call: Σ entropy of the gates (nats), tokens, Σ gates of each expert.

        Sums over the tokens that forward saw in training mode; a token that activation checkpointing sends through
        twice counts twice. Sums of the ranks add up. No host synchronisation.
        """
        stats = self._router_stats
        self._router_stats = None
        return self.router.new_zeros(self.n_experts + 2, dtype=torch.float32) if stats is None else stats

    def _count(self, gates: Tensor) -> None:
        gates = gates.reshape(-1, self.n_experts).float()
        entropy = -torch.special.xlogy(gates, gates).sum()
        stats = torch.cat([entropy.view(1), gates.new_full((1,), gates.shape[0]), gates.sum(0)])
        self._router_stats = stats if self._router_stats is None else self._router_stats + stats

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, n_experts={self.n_experts}, ste={self.ste}"


@torch.no_grad()
def rank_one(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(scale_in [1, K], scale_out [1, N]) with scale_outᵀ scale_in the best rank-1 approximation of |weight|.

    The leading singular vectors, each times the root of the singular value, in fp32 or wider. |W| has no negative
    entries, so neither have they, and the power iteration from the row means converges to them within a few rounds.
    """
    magnitudes = weight.detach().to(wide(weight.dtype)).abs()
    tiny = torch.finfo(magnitudes.dtype).tiny
    left = magnitudes.mean(1)
    right = magnitudes.mean(0)
    for _ in range(POWER_ITERATIONS):
        left = left / left.norm().clamp_min(tiny)
        right = magnitudes.T @ left
        right = right / right.norm().clamp_min(tiny)
        left = magnitudes @ right  # its norm is the singular value
    root = left.norm().sqrt().clamp_min(tiny)
    return (right * root).unsqueeze(0), (left / root).unsqueeze(0)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _checked_ste(ste: str) -> str:
    if ste not in STES:
        raise ValueError(f"ste={ste!r} is unknown; choose {' or '.join(STES)}")
    return ste
