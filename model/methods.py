"""The Linears of a model, and the layers that they become under binarize.method (model/method_table.py).

Letters: N out_features, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fbitrain.model.config import BinarizeConfig
from fbitrain.model.latent import LatentLinear


@dataclass(frozen=True)
class FullLinear:
    """A torch.nn.Linear or a transformers Conv1D (GPT-2's Linear, whose weight is [K, N]), as a Linear is described."""

    module: nn.Module
    in_features: int
    out_features: int

    @classmethod
    def of(cls, module: nn.Module) -> FullLinear | None:
        """The linear that `module` is, or None if it is neither."""
        if isinstance(module, nn.Linear):
            return cls(module, module.in_features, module.out_features)
        if isinstance(module, Conv1D):
            return cls(module, module.nx, module.nf)
        return None

    @property
    def parameter(self) -> nn.Parameter:
        """The weight as the module holds it."""
        return self.module.get_parameter("weight")

    @property
    def has_values(self) -> bool:
        """False on the meta device, and where ZeRO-3 has partitioned the weight and left an empty tensor."""
        return not self.parameter.is_meta and self.parameter.numel() == self.in_features * self.out_features

    def latent(self, init_std: float) -> dict[str, Any]:
        """LatentLinear's arguments for a layer in this one's place, with its values, if it has any."""
        weight, bias = self.parameter, self.module.get_parameter("bias") if self._has_bias else None
        device = None if weight.is_meta else weight.device
        if bias is not None and (bias.is_meta or bias.numel() != self.out_features):
            bias = nn.Parameter(torch.zeros(self.out_features, device=device))
        values = oriented(self.module, weight) if self.has_values else None
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "weight": values,
            "bias": bias,
            "init_std": init_std,
            "device": device,
            "dtype": weight.dtype,
        }

    @property
    def _has_bias(self) -> bool:
        return "bias" in dict(self.module.named_parameters(recurse=False))


def oriented(module: nn.Module, like_weight: Tensor) -> Tensor:
    """A tensor of the shape of `module.weight` as [N, K], or one [N, K] as the module keeps it: Conv1D's is [K, N]."""
    return like_weight.T if isinstance(module, Conv1D) else like_weight


def make_layer(linear: FullLinear, binarize: BinarizeConfig, mask: Tensor | None, init_std: float) -> LatentLinear:
    """The layer that `linear` becomes, in its training mode; mask bool [N, K] for methods with salient weights."""
    layer = layer_class(binarize).make(binarize, mask, linear.latent(init_std))
    return layer.train(linear.module.training)


def layer_class(binarize: BinarizeConfig) -> type[LatentLinear]:
    """The class that the table of methods names, from its own file."""
    file, _, name = binarize.traits.layer.partition(".")
    layer: type[LatentLinear] = getattr(import_module(f"fbitrain.model.{file}"), name)
    return layer
