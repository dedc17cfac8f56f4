"""The layer-wise Hessian of GPTQ (arXiv 2210.17323) and its inverse.

For the error ||X Wᵀ - X Ŵᵀ||² of a layer the Hessian is the same for every row of W: XᵀX, up to a positive factor that
nothing here depends on. Letters: M tokens, K in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

ESCALATIONS = 3  # times that the damping grows tenfold before a Hessian is given up
MIN_ESCALATED = 1e-3  # what it grows to at least, where the damping asked for was tiny


class SingularHessianError(ValueError):
    """A Hessian without a Cholesky factor however much it is damped: NaN, infinite, or zero throughout."""


class HessianSum:
    """Mean of x xᵀ over all tokens added, fp32 [K, K] unless `dtype` says otherwise."""

    def __init__(self, k: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        self._sum_KK = torch.zeros(k, k, device=device, dtype=dtype)
        self._n_tokens = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Takes x [..., K] in."""
        x_MK = x.reshape(-1, x.shape[-1]).to(self._sum_KK.dtype)
        self._sum_KK.addmm_(x_MK.T, x_MK)
        self._n_tokens += len(x_MK)

    def mean(self) -> Tensor:
        """[K, K]; zeros if no token was added."""
        return self._sum_KK / max(self._n_tokens, 1)


def inverse_factor(hessian_KK: Tensor, damping: float) -> Tensor:
    """The upper triangular U [K, K] with UᵀU = (H + λI)⁻¹, where λ = damping · mean(diag H).

    Row i of U is what GPTQ's error feedback needs: U[i, i:] / U[i, i] is row i of the inverse Hessian of columns i and
    later, divided by its diagonal entry. A dead input (zero row and column) has no entries but its own, 1/√λ, so
    nothing is fed back from it or into it. Where H + λI is not positive definite in this precision, λ is raised
    tenfold, ESCALATIONS times at most; then SingularHessianError.
    """
    mean_diagonal = hessian_KK.diagonal().mean()
    for _ in range(1 + ESCALATIONS):
        damped_KK = hessian_KK.clone()
        damped_KK.diagonal().add_(damping * mean_diagonal)
        # H = R Rᵀ with R upper triangular is the Cholesky factor of H read backwards; then H⁻¹ = R⁻ᵀR⁻¹. One inverse
        # of a triangle in place of GPTQ's two factorisations, and H⁻¹ itself is never rounded.
        factor, info = torch.linalg.cholesky_ex(damped_KK.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(factor).all()):
            identity = torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
            inverse: Tensor = torch.linalg.solve_triangular(factor.flip(0, 1), identity, upper=True)
            return inverse
        damping = max(10 * damping, MIN_ESCALATED)
    raise SingularHessianError(
        "its Hessian has no Cholesky factor even when damped: its inputs are all zero, NaN or inf"
    )


def inverse_diagonal(factor_KK: Tensor) -> Tensor:
    """diag (H + λI)⁻¹, [K], from the U that `inverse_factor` returns."""
    return factor_KK.square().sum(0)
