"""From a trained layer's tensors to those of a release: one layer at a time, every method.

A release's scales and levels are rounded once, to its dtype, and stored in fp32; `dense` writes out the ŵ that `packed`
holds. So the two formats hold the same function: exactly, where ŵ has one scale per weight; where a weight is a product
(OneBit, int8 salient weights, 2 to 4 bits), dense rounds that product once more.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, G group size, P sign planes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels.layout import NARROW_COLUMNS
from fbitrain.kernels.ops import pack_signs
from fbitrain.model.bibench import BINARIZERS
from fbitrain.model.bitnet import QUANTIZERS
from fbitrain.model.config import SALIENT_METHODS, BinarizeConfig
from fbitrain.model.partial import STEP, ordinary_alpha, unpack_mask
from fbitrain.model.remote_code import BinaryModel
from fbitrain.model.remote_layers import PackedWeight
from fbitrain.model.storage import salient_storage

# What a checkpoint holds of a binary layer besides its bias, whatever the method.
TRAINED = (
    *("weight", "alpha", "beta", "scale_in", "scale_out", "router"),
    *("salient_bits", "salient_values", "salient_scale"),
)


@dataclass(frozen=True)
class PackedLayer:
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
        if self.kind == "mixture":
            raise ValueError("the effective weight of a mixture of scales depends on the token")
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
def pack_layer(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> PackedLayer:
    """The release's form of a layer that was trained with `binarize`.

    trained: by leaf name, those of TRAINED that its checkpoint has, fp32 but for what is frozen.
    dtype: what scales are rounded to.
    """
    method = binarize.method
    if method == "binary":
        return _binary(binarize, trained, dtype)
    if method in SALIENT_METHODS:
        return _partial(binarize, trained, dtype)
    signs = {"weight_bits": pack_signs(trained["weight"])}
    if method == "onebit":
        return PackedLayer("onebit", {}, signs | _rounded(trained, dtype, "scale_in", "scale_out"))
    if method == "mixture_of_scales":
        tensors = signs | _rounded(trained, dtype, "scale_in", "scale_out", "router")
        return PackedLayer("mixture", {"n_experts": len(trained["router"])}, tensors)
    if method == "ternary":
        return _ternary(trained["weight"], dtype)
    return _one_scale(method, trained["weight"], dtype)


def _binary(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> PackedLayer:
    levels = Levels.of(trained["alpha"], trained.get("beta"), dtype)
    tensors = {"weight_bits": pack_signs(trained["weight"]), "alpha": levels.alpha}
    if "beta" in trained:
        tensors["beta"] = levels.beta
    return _signs(binarize.scale, tensors, binarize.group_size)


def _one_scale(method: str, weight: Tensor, dtype: torch.dtype) -> PackedLayer:
    """BiBench's methods, a scale per row or none, and bitnet, a scale for all: ŵ says both scale and signs."""
    int8 = method in QUANTIZERS
    scale = "tensor" if int8 or method == "bnn" else "row"
    effective = (QUANTIZERS if int8 else BINARIZERS)[method](weight)
    alpha = effective.abs().amax(1, keepdim=True)
    alpha = alpha if scale == "row" else alpha[:1]
    return _signs(scale, {"weight_bits": pack_signs(effective), "alpha": alpha.to(dtype).float()}, int8=int8)


def _signs(scale: str, tensors: dict[str, Tensor], group_size: int = 0, int8: bool = False) -> PackedLayer:
    return PackedLayer("binary", sign_options(scale, "beta" in tensors, group_size, int8), tensors)


def sign_options(scale: str, beta: bool, group_size: int, int8: bool = False) -> dict[str, Any]:
    """The options of a layer of kind "binary"."""
    options = {"scale": scale, "beta": beta, "int8": int8}
    return options | ({"group_size": group_size} if scale == "group" else {})


def _ternary(weight: Tensor, dtype: torch.dtype) -> PackedLayer:
    effective = QUANTIZERS["ternary"](weight)
    planes = torch.stack([torch.where(effective > 0, 1.0, -1.0), torch.where(effective < 0, -1.0, 1.0)])
    alpha = effective.abs().max().view(1, 1).to(dtype).float()
    return PackedLayer("ternary", {}, {"weight_bits": pack_signs(planes), "alpha": alpha})


def _partial(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> PackedLayer:
    weight, bits = trained["weight"], binarize.bits
    n, k = weight.shape
    mask = unpack_mask(trained["salient_bits"], k)
    group_size = binarize.group_size if binarize.scale == "group" else k
    # The levels of b bits, ±1/2, ±3/2, … steps, are the sums of b signs weighted 1/2, 1, 2, … steps.
    step = ordinary_alpha(weight, mask, group_size) * STEP[bits]
    spread = step.where(step > 0, 1).repeat_interleave(group_size, dim=1)
    codes = (weight / spread).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).int() + 2 ** (bits - 1)
    planes = torch.stack([((codes >> plane) & 1) - 0.5 for plane in range(bits)])
    tensors = {"weight_bits": pack_signs(planes), "alpha": (step / 2).to(dtype).float()}
    salient = binarize.salient.dtype
    if "salient_values" in trained:
        tensors["salient_values"] = trained["salient_values"]
        if salient == "int8":
            tensors["salient_scale"] = trained["salient_scale"].float()
    else:
        tensors["salient_values"] = weight[mask].to(torch.float16)
    n_salient = len(tensors["salient_values"])
    places = "csr" if "csr" in salient_storage(n, k, n_salient, salient, bits, 0) else "mask"
    tensors |= {"salient_mask": trained["salient_bits"]} if places == "mask" else _csr(mask)
    options = {"salient_dtype": salient, "scale": binarize.scale, "bits": bits}
    options |= {"group_size": binarize.group_size} if binarize.scale == "group" else {}
    return PackedLayer("partial", options, tensors, {"n_salient": n_salient, "places": places})


def _csr(mask: Tensor) -> dict[str, Tensor]:
    rows, columns = mask.nonzero(as_tuple=True)
    starts = torch.bincount(rows, minlength=len(mask)).cumsum(0)
    narrow = torch.uint16 if mask.shape[1] <= NARROW_COLUMNS else torch.int32
    return {"salient_columns": columns.to(narrow), "salient_rows": torch.cat([starts.new_zeros(1), starts]).int()}


def _rounded(trained: Mapping[str, Tensor], dtype: torch.dtype, *names: str) -> dict[str, Tensor]:
    return {name: trained[name].to(dtype).float() for name in names}
