"""Products with a weight that is built anew each time it is needed.

Between forward and backward only x and what ŵ is built from are kept, never ŵ itself.
Letters: N out_features, K in_features, M tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fbitrain.model.latent import LatentLinear

Recipe = Callable[..., Tensor]


def recomputed_linear(x: Tensor, recipe: Recipe, *tensors: Tensor | None) -> Tensor:
    """x ŵᵀ for x [..., K] and ŵ [N, K] = recipe(*tensors), in x's dtype.

    `recipe` must be a pure function of its arguments; the gradients of those that need one are what autograd gives.
    """
    y: Tensor = _run(x, recipe, *tensors)
    return y


class RecomputedLinear(LatentLinear):
    """A LatentLinear whose ŵ is a pure function of its tensors."""

    @abstractmethod
    def recipe(self) -> tuple[Recipe, tuple[Tensor | None, ...]]:
        """(recipe, tensors) with ŵ = recipe(*tensors) in the weight's dtype."""

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> x ŵᵀ [..., N] in x's dtype."""
        recipe, tensors = self.recipe()
        return recomputed_linear(x, recipe, *tensors)

    @torch.no_grad()
    def binary_weight(self) -> Tensor:
        """ŵ [N, K] in the weight's dtype, without a graph. The parameters must be whole."""
        recipe, tensors = self.recipe()
        return recipe(*tensors)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, recipe: Recipe, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.recipe = recipe
        return F.linear(x, recipe(*tensors).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        with torch.enable_grad():
            leaves = [
                tensor.detach().requires_grad_(need) if need else tensor
                for tensor, need in zip(tensors, needs, strict=True)
            ]
            effective = ctx.recipe(*leaves)
        dx = dy @ effective.detach().to(dy.dtype) if needs_x else None
        gradients: list[Tensor | None] = [None] * len(leaves)
        if any(needs):
            dweight = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            wanted = [i for i, need in enumerate(needs) if need]
            found = torch.autograd.grad(effective, [leaves[i] for i in wanted], dweight.to(effective.dtype))
            for i, gradient in zip(wanted, found, strict=True):
                gradients[i] = gradient
        return dx, None, *gradients


# torch.compile cannot follow a backward pass that runs autograd itself: it goes round this product, not through it.
_run = torch.compiler.disable(_Recomputed.apply)  # type: ignore[no-untyped-call]
