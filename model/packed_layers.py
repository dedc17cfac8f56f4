"""The packed layers of a release on fbitrain's kernels: computed from the bits, no weight is ever unpacked.

Tensors and constructors are those of `fbitrain.model.remote_layers`, whose layers compute the same in plain torch.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, E experts, P sign planes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels import ops
from fbitrain.kernels.layout import NARROW_COLUMNS, scale_shape
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight
from fbitrain.model import remote_layers


class PackedBinaryLinear(remote_layers.PackedLinear):
    """y = x ŵᵀ + bias with ŵ = α·sign + β: BinaryLinear, and every method with one sign and one pattern of scales."""

    def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
        scale, group_size = options.get("scale", "column"), options.get("group_size", 128)
        if scale == "group" and options.get("beta", True):
            raise ValueError("scale='group' has no shift; beta must be False")
        scale_shape(scale, out_features, in_features, group_size)  # refuses what is no pattern
        super().__init__(in_features, out_features, **options)

    def product(self, x: Tensor) -> Tensor:
        """x ŵᵀ."""
        sizes = self.in_features, self.group_size
        weight = BinaryWeight(self.weight_bits, self.alpha, self.beta, self.scale, *sizes)
        return ops.binary_linear(x, weight, "int8" if self.int8 else "float")


class PackedTernaryLinear(remote_layers.PackedTernaryLinear):
    """y = x ŵᵀ + bias with ŵ = α·(sign + sign) / 2, x rounded to int8 per token: both signs' products in one call."""

    def product(self, x: Tensor) -> Tensor:
        """x ŵᵀ."""
        weight = BinaryWeight(self.weight_bits.flatten(0, 1), self.alpha / 2, None, "tensor", self.in_features)
        return _add_planes(ops.binary_linear(x, weight, "int8"), 2)


class PackedPartialLinear(remote_layers.PackedPartialLinear):
    """y = x ŵᵀ + bias; ŵ is salient weights in their places, elsewhere α·Σ_p 2^p·sign_p.

    The P planes are one weight of P·N rows, of which the first N have the salient weights as they are and the others
    zeros in the same places.
    """

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self._weight: PartialWeight | None = None  # made of the tensors when it is first needed
        self.register_load_state_dict_post_hook(_forget)  # type: ignore[no-untyped-call]

    def product(self, x: Tensor) -> Tensor:
        """x ŵᵀ."""
        if self._weight is None:
            self._weight = self._all_planes()
        return _add_planes(ops.partial_linear(x, self._weight), len(self.weight_bits))

    def _all_planes(self) -> PartialWeight:
        """The weight of P·N rows."""
        n_planes, count = len(self.weight_bits), len(self.salient_values)
        rows, columns = torch.cat([self.mask(rows) for rows in self.row_blocks()]).nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=self.out_features).repeat(n_planes)
        alpha, values, value_scale = self.alpha, self.salient_values, self.salient_scale
        if n_planes > 1:
            alpha = torch.cat([alpha * 2**plane for plane in range(n_planes)])
            values = torch.cat([values, values.new_zeros((n_planes - 1) * count)])
            value_scale = None if value_scale is None else value_scale.repeat(n_planes, 1)
        return PartialWeight(
            words=self.weight_bits.flatten(0, 1),
            alpha=alpha,
            scale=self.scale,
            row_starts=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
            columns=columns.repeat(n_planes).to(torch.uint16 if self.in_features <= NARROW_COLUMNS else torch.int32),
            values=values,
            value_scale=value_scale,
            k=self.in_features,
            group_size=self.group_size,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedPartialLinear:
        self._weight = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _forget(layer: PackedPartialLinear, _: Any) -> None:
    layer._weight = None


class PackedOneBitLinear(remote_layers.PackedOneBitLinear):
    """y = ((x·scale_in) Sᵀ)·scale_out + bias."""

    def product(self, x: Tensor) -> Tensor:
        """x ŵᵀ."""
        y = ops.binary_linear(x, BinaryWeight(self.weight_bits, self.scale_in, None, "column", self.in_features))
        return self.normed(y * self.scale_out[0].to(x.dtype))


class PackedMixtureLinear(remote_layers.PackedMixtureLinear):
    """y = ((x·(g scale_in)) Sᵀ)·(g scale_out) + bias, g = softmax(x routerᵀ) in fp32."""

    def product(self, x: Tensor) -> Tensor:
        """The product with the scales of each token."""
        scales = self.scale_in, self.scale_out
        return ops.mixture_linear(x, MixtureWeight(self.weight_bits, self.gates(x), *scales, self.in_features))


def _add_planes(y: Tensor, n_planes: int) -> Tensor:
    """[..., P·N] -> [..., N]."""
    return y if n_planes == 1 else torch.unflatten(y, -1, (n_planes, -1)).sum(-2)


LAYERS: dict[str, type[remote_layers.PackedWeight]] = {
    "binary": PackedBinaryLinear,
    "ternary": PackedTernaryLinear,
    "partial": PackedPartialLinear,
    "onebit": PackedOneBitLinear,
    "mixture": PackedMixtureLinear,
}
