"""The five binarizers that BiBench compares (arXiv 2301.11233), for the weights of a Linear.

Each has a forward value and a rule for the gradient, as the method's own paper gives it (PAPER) or as the benchmark's
code does where that differs (BENCHMARK). All but `bnn` scale a row by α = mean |w| over it (`recu`: of its
clamped weights): the papers' networks have batch norm behind each product, and a Transformer has not. The parts of the
papers that binarize activations, change the network or add modules (FDA-BNN's noise adaptation) are left out.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fbitrain.model.binarize import sign, sign_ste, wide, with_slope
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.packing import StoredLayer, pack_scaled_signs
from fbitrain.model.recomputed import Recipe, RecomputedLinear

RECU_TAU = 0.99  # quantile beyond which weights are clamped; the paper's schedule goes from 0.85 up to it
FDA_OMEGA = 0.1  # angular frequency of the square wave whose Fourier series stands for the sign
FDA_TERMS = 10


class BiBenchLinear(RecomputedLinear):
    """y = x ŵᵀ + bias with the ŵ and the gradient of one of BiBench's methods.

    Args, beyond those of LatentLinear: `method`, one of bnn, xnor, bireal, recu, fda; `variant`, "paper" or
    "benchmark".
    """

    def __init__(
        self, in_features: int, out_features: int, *, method: str, variant: str = "paper", **latent: Any
    ) -> None:
        for name, value, choices in (("method", method, PAPER), ("variant", variant, BINARIZERS)):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
        super().__init__(in_features, out_features, **latent)
        self.method, self.variant = method, variant

    @staticmethod
    def pack(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> StoredLayer:
        """See LatentLinear."""
        effective = BINARIZERS[binarize.variant][binarize.method](trained["weight"])
        return pack_scaled_signs(effective, "tensor" if binarize.method == "bnn" else "row", dtype)

    def recipe(self) -> tuple[Recipe, tuple[Tensor | None, ...]]:
        """ŵ as a function of the weight."""
        return BINARIZERS[self.variant][self.method], (self.weight,)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, method={self.method}, variant={self.variant}"


def bnn(w: Tensor) -> Tensor:
    """sign(w); the gradient passes where |w| <= 1 (Hubara et al., arXiv 1602.02830)."""
    return sign_ste(w, "clip")


def xnor(w: Tensor) -> Tensor:
    """α·sign(w) with the gradient dŵ·(1/K + α·[|w| <= 1]) (Rastegari et al., arXiv 1603.05279, section 3.1)."""
    alpha = _row_mean(w.abs())
    return with_slope(alpha * sign(w.detach()), w, lambda: 1 / w.shape[1] + alpha * _within_one(w))


def xnor_centred(w: Tensor) -> Tensor:
    """BiBench's XNOR: α·sign(c) of the centred row c = w - mean w, α = mean |c|.

    The gradient is dŵ·α·[|c| <= 1] by c, and goes back through the centring.
    """
    c = w - w.mean(1, keepdim=True)
    alpha = _row_mean(c.abs())
    return with_slope(alpha * sign(c.detach()), c, lambda: alpha * _within_one(c))


def bireal(w: Tensor) -> Tensor:
    """α·sign(w) with the gradient dŵ·α·max(0, 2 - 2|w|) (Liu et al., arXiv 1808.00278).

    The magnitude-aware factor α of the paper's weights and its piecewise polynomial ApproxSign, which the paper has for
    activations.
    """
    alpha = _row_mean(w.abs())
    return with_slope(alpha * sign(w.detach()), w, lambda: alpha * (2 - 2 * w.detach().abs()).clamp_min(0))


def bireal_clip(w: Tensor) -> Tensor:
    """BiBench's Bi-Real: α·sign(w) with the gradient dŵ·[|w| <= 1], without α."""
    return with_slope(_row_mean(w.abs()) * sign(w.detach()), w, lambda: _within_one(w))


def recu(w: Tensor, spread: float = 1.0) -> Tensor:
    """α·sign(v), v = clamp(u, Q(1-τ), Q(τ)) of the row's standardized weights u (Xu et al., arXiv 2103.12369).

    Q(τ) = -b·ln(2 - 2τ), b = mean |u|, is the quantile of a Laplace distribution, as in the paper. α = σ·mean |v|, in
    the weights' own unit, is constant in the gradient, which passes the sign unchanged and goes back through clamp and
    standardization: weights beyond the quantile, the paper's dead ones, get one through the row's mean and σ only.
    spread: the standard deviation of u; it leaves ŵ as it is and multiplies the gradient.
    """
    u = w.to(wide(w.dtype))
    u = u - u.mean(1, keepdim=True)
    deviation = (u.square().mean(1, keepdim=True) + torch.finfo(u.dtype).tiny).sqrt()
    u = u / deviation
    limit = -_row_mean(u.abs()) * math.log(2 - 2 * RECU_TAU)
    v = u.clamp(-limit, limit)
    alpha = deviation.detach() * _row_mean(v.abs())
    return (alpha * sign_ste(spread * v, "identity")).to(w.dtype)


def recu_spread(w: Tensor) -> Tensor:
    """BiBench's ReCU, whose u has the standard deviation 2√2: the gradient is 2√2 times as large."""
    return recu(w, 2 * math.sqrt(2))


def fda(w: Tensor) -> Tensor:
    """α·sign(w) with the gradient dŵ·α·(4ω/π)·Σ_{i<n} cos((2i+1)ωw) where |w| <= 1 (Xu et al., arXiv 2103.00841)."""
    alpha = _row_mean(w.abs())

    def slope() -> Tensor:
        # The sum of the cosines is sin(2nθ) / (2 sin θ), θ = ωw; torch.sinc(x) is sin(πx) / (πx), and 1 at 0.
        x = FDA_OMEGA / math.pi * w.detach().to(alpha.dtype)
        series = FDA_TERMS * torch.sinc(2 * FDA_TERMS * x) / torch.sinc(x)
        return alpha * (4 * FDA_OMEGA / math.pi) * series * _within_one(w)

    return with_slope(alpha * sign(w.detach()), w, slope)


PAPER: dict[str, Callable[[Tensor], Tensor]] = {
    "bnn": bnn,
    "xnor": xnor,
    "bireal": bireal,
    "recu": recu,
    "fda": fda,
}
BENCHMARK = PAPER | {"xnor": xnor_centred, "bireal": bireal_clip, "recu": recu_spread}
BINARIZERS = {"paper": PAPER, "benchmark": BENCHMARK}


def _row_mean(values: Tensor) -> Tensor:
    """[N, 1] in fp32 or wider, a constant in the gradient."""
    return values.detach().mean(1, keepdim=True, dtype=wide(values.dtype))


def _within_one(w: Tensor) -> Tensor:
    return (w.detach().abs() <= 1).to(wide(w.dtype))
