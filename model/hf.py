"""A binary Llama on its way to and from Hugging Face folders.

Out: `dense_tensors` and `packed_tensors` turn trained weights into the tensors of a release folder; both start from the
same rounded levels, so the two folders hold the same function. In: importing this module registers the packed folders'
model_type, so that AutoModelForCausalLM loads them with fbitrain's kernels and no trust_remote_code.

N out_features, K in_features, G group size.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from fbitrain.kernels.ops import pack_signs
from fbitrain.model import remote_code
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.linear import PackedBinaryLinear
from fbitrain.model.remote_code import BinaryLlamaConfig

REMOTE_CODE = Path(remote_code.__file__)
AUTO_MAP = {
    "AutoConfig": f"{REMOTE_CODE.stem}.BinaryLlamaConfig",
    "AutoModelForCausalLM": f"{REMOTE_CODE.stem}.BinaryLlamaForCausalLM",
}


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

    def dense(self, weight: Tensor) -> Tensor:
        """ŵ [N,K] in the levels' dtype, for latent weights [N,K]."""
        high, low = self.high, self.low
        if high.shape[1] not in (1, weight.shape[1]):  # group: one entry for G neighbours
            group_size = weight.shape[1] // high.shape[1]
            high, low = (level.repeat_interleave(group_size, dim=1) for level in (high, low))
        return torch.where(weight >= 0, high, low)


def binary_layers(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the binary layers in a state dict: those that have an α."""
    return [name.removesuffix(".alpha") for name in weights if name.endswith(".alpha")]


def dense_tensors(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a plain LlamaForCausalLM that computes what the binary model with these `weights` computes.

    weights: fp32 state dict of a LlamaForCausalLM with BinaryLinear. Everything comes out in `dtype`.
    """
    tensors = _full_precision_tensors(weights, dtype)
    for name, levels in _levels(weights, dtype).items():
        tensors[f"{name}.weight"] = levels.dense(weights[f"{name}.weight"])
    return tensors


def packed_tensors(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a BinaryLlamaForCausalLM: bits int32 [N,ceil(K/32)], α and β fp32; the rest in `dtype`."""
    tensors = _full_precision_tensors(weights, dtype)
    for name, levels in _levels(weights, dtype).items():
        tensors[f"{name}.weight_bits"] = pack_signs(weights[f"{name}.weight"])
        tensors[f"{name}.alpha"] = levels.alpha
        if f"{name}.beta" in weights:
            tensors[f"{name}.beta"] = levels.beta
    return tensors


def _levels(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Levels]:
    return {
        name: Levels.of(weights[f"{name}.alpha"], weights.get(f"{name}.beta"), dtype) for name in binary_layers(weights)
    }


def _full_precision_tensors(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    parts = {f"{name}.{part}" for name in binary_layers(weights) for part in ("weight", "alpha", "beta")}
    return {name: tensor.to(dtype) for name, tensor in weights.items() if name not in parts}


def packed_config(config: LlamaConfig, binarize: BinarizeConfig, bits_per_weight: float) -> BinaryLlamaConfig:
    """The packed folder's config for a model that `config` (shape) and `binarize` describe."""
    shape = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    how = {key: value for key, value in asdict(binarize).items() if key in ("scale", "beta", "group_size", "skip")}
    packed = BinaryLlamaConfig(**shape, binarize=how, bits_per_weight=bits_per_weight)
    packed.architectures = ["BinaryLlamaForCausalLM"]
    packed.auto_map = AUTO_MAP
    return packed


class BinaryLlamaForCausalLM(remote_code.BinaryLlamaForCausalLM):
    """The packed binary Llama on fbitrain's kernels: same folders, same tensors as the self-contained one."""

    @staticmethod
    def packed_linear(in_features: int, out_features: int, binarize: dict[str, Any]) -> nn.Module:
        """fbitrain's layer with the tensors of `remote_code.PackedLinear`."""
        return PackedBinaryLinear(
            in_features,
            out_features,
            scale=binarize["scale"],
            beta=binarize["beta"],
            group_size=binarize["group_size"],
        )

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder again loads where fbitrain is not installed."""
        self.config.auto_map = AUTO_MAP
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copy(REMOTE_CODE, save_directory)


AutoConfig.register(BinaryLlamaConfig.model_type, BinaryLlamaConfig)
AutoModelForCausalLM.register(BinaryLlamaConfig, BinaryLlamaForCausalLM)
