"""From a trained layer's tensors to those of a release, one layer at a time. Each method's part is its layer's `pack`.

A release's scales and levels are rounded once, to its dtype, and stored in fp32; `dense` writes out the ŵ that `packed`
holds. So the two formats hold the same function: exactly, where ŵ has one scale per weight; where a weight is a product
(OneBit, int8 salient weights, 2 to 4 bits), dense rounds that product once more.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels.ops import pack_signs
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.methods import layer_class
from fbitrain.model.remote_code import BinaryModel
from fbitrain.model.remote_layers import PackedWeight


@dataclass(frozen=True)
class StoredLayer:
    """A layer as a release stores it.

    kind: its class, a key of `remote_code.BinaryModel.layers`. options: the class's arguments but in_features,
    out_features and bias; own_options: those of them that are not the same for all layers. tensors: the class's
    buffers by name.
    """

    kind: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]
    own_options: dict[str, Any] = field(default_factory=dict)

    def weight(self, in_features: int, out_features: int) -> Tensor:
        """ŵ [N, K] in fp32, as the tensors give it back. Raises ValueError where it depends on the token."""
        if self.kind == "mixture" or self.options.get("output_norm"):
            raise ValueError("the effective weight of a mixture of scales, or behind a norm, depends on the token")
        layer: PackedWeight = BinaryModel.layers[self.kind](
            in_features, out_features, **self.options, **self.own_options
        )
        layer.load_state_dict(self.tensors)
        return layer.weight()


@dataclass(frozen=True)
class Levels:
    """The two values that a binary layer's weights take, one pair per scale entry, rounded once for all formats.

    high and low have α's shape and the release dtype: high = β + α stands for sign +1, low = β - α for sign -1. A
    learned α may be negative; then high is the smaller one, which changes nothing.
    """

    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, alpha: Tensor, beta: Tensor | None, dtype: torch.dtype) -> Levels:
        if beta is None:
            rounded = alpha.to(dtype)
            return cls(rounded, -rounded)
        exact_alpha, exact_beta = alpha.double(), beta.double()
        return cls((exact_beta + exact_alpha).to(dtype), (exact_beta - exact_alpha).to(dtype))

    @property
    def alpha(self) -> Tensor:
        return ((self.high.double() - self.low.double()) / 2).float()

    @property
    def beta(self) -> Tensor:
        return ((self.high.double() + self.low.double()) / 2).float()


@torch.no_grad()
def pack_layer(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> StoredLayer:
    """The release's form of a layer that was trained with `binarize`.

    trained: by leaf name, those of method_table.TRAINED_NAMES that its checkpoint has, fp32 but for what is frozen.
    dtype: what scales are rounded to.
    """
    return layer_class(binarize).pack(binarize, trained, dtype)


def pack_scaled_signs(effective: Tensor, scale: str, dtype: torch.dtype, *, int8: bool = False) -> StoredLayer:
    """From ŵ [N, K], which is ±α with one α per row (`scale` "row") or one for all ("tensor"): it says α and signs.

    int8: tokens are rounded to int8 in front of the product.
    """
    alpha = effective.abs().amax(1, keepdim=True)
    alpha = alpha if scale == "row" else alpha[:1]
    tensors = {"weight_bits": pack_signs(effective), "alpha": alpha.to(dtype).float()}
    return StoredLayer("binary", sign_options(scale, False, 0, int8), tensors)


def sign_options(scale: str, beta: bool, group_size: int, int8: bool = False) -> dict[str, Any]:
    """The options of a layer of kind "binary"."""
    options = {"scale": scale, "beta": beta, "int8": int8}
    return options | ({"group_size": group_size} if scale == "group" else {})


def rounded(trained: Mapping[str, Tensor], dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    """The tensors called `names`, rounded to `dtype`, in fp32."""
    return {name: trained[name].to(dtype).float() for name in names}
