"""BitNet's layers: binary (arXiv 2310.11453) and ternary, "b1.58" (arXiv 2402.17764), both with int8 activations.

The normalisation that both papers put in front of each product (SubLN) is a module of its own and not part of a
Linear: it is left out.

Letters: N out_features, K in_features, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels.ops import pack_signs
from fbitrain.model.binarize import sign, wide, with_slope
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.packing import StoredLayer, pack_scaled_signs
from fbitrain.model.recomputed import Recipe, RecomputedLinear, recomputed_linear

INT8_MAX = 127


class BitNetLinear(RecomputedLinear):
    """y = q(x) ŵᵀ + bias; q rounds each token to int8, ŵ has two values ("bitnet") or three ("ternary").

    Both roundings pass their gradient unchanged. One scale serves the whole matrix.

    Args, beyond those of LatentLinear: `method`, "bitnet" or "ternary".
    """

    def __init__(self, in_features: int, out_features: int, *, method: str, **latent: Any) -> None:
        if method not in QUANTIZERS:
            raise ValueError(f"method={method!r} is unknown; choose {' or '.join(QUANTIZERS)}")
        super().__init__(in_features, out_features, **latent)
        self.method = method

    @staticmethod
    def pack(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> StoredLayer:
        """See LatentLinear."""
        effective = QUANTIZERS[binarize.method](trained["weight"])
        if binarize.method == "bitnet":
            return pack_scaled_signs(effective, "tensor", dtype, int8=True)
        planes = torch.stack([torch.where(effective > 0, 1.0, -1.0), torch.where(effective < 0, -1.0, 1.0)])
        alpha = effective.abs().max().view(1, 1).to(dtype).float()
        return StoredLayer("ternary", {}, {"weight_bits": pack_signs(planes), "alpha": alpha})

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> q(x) ŵᵀ [..., N] in x's dtype."""
        codes, step = quantize_tokens(x)
        return recomputed_linear(codes, QUANTIZERS[self.method], self.weight) * step.to(x.dtype)

    def recipe(self) -> tuple[Recipe, tuple[Tensor | None, ...]]:
        """ŵ as a function of the weight."""
        return QUANTIZERS[self.method], (self.weight,)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method}"


def mean_centred_sign(w: Tensor) -> Tensor:
    """β·sign(w - mean w), β = mean |w|, both over the matrix; the gradient passes unchanged."""
    values = w.detach().to(wide(w.dtype))
    return with_slope(values.abs().mean() * sign(values - values.mean()), w)


def ternary(w: Tensor) -> Tensor:
    """γ·clip(round(w / γ), -1, 1), γ = mean |w| over the matrix; the gradient passes unchanged."""
    values = w.detach().to(wide(w.dtype))
    gamma = values.abs().mean().clamp_min(torch.finfo(values.dtype).tiny)
    return with_slope(gamma * (values / gamma).round().clamp(-1, 1), w)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [..., K], step [..., 1]) with x ≈ codes·step: each token on its int8 grid, max |x| / 127 apart.

    Codes are whole numbers in x's dtype, which holds them exactly, and the same as those of kernels' `quantize_int8`.
    The gradient of codes·step passes to x unchanged.
    """
    values = x.detach().to(wide(x.dtype))
    step = values.abs().amax(-1, keepdim=True) / INT8_MAX
    step = step.where(step >= torch.finfo(torch.float32).tiny, 1)  # too small for its inverse: such a token becomes 0
    inverse = 1 / step
    return with_slope((values * inverse).round(), x, lambda: inverse), step


QUANTIZERS = {"bitnet": mean_centred_sign, "ternary": ternary}
