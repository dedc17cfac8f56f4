"""A binary model on its way to and from Hugging Face folders.

Out: `ReleasedModel` turns trained weights into the tensors of a release folder. In: importing this module registers the
packed folders of Llamas, so that AutoModelForCausalLM loads them with fbitrain's kernels and no trust_remote_code;
`register` does it for another architecture.

N out_features, K in_features.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from fbitrain.model import remote_code, remote_layers
from fbitrain.model.build import chosen_linears
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.method_table import TRAINED_NAMES
from fbitrain.model.methods import FullLinear, oriented
from fbitrain.model.packed_layers import LAYERS
from fbitrain.model.packing import StoredLayer, pack_layer
from fbitrain.model.remote_code import MODEL_TYPE, PREFIX

REMOTE_CODE = Path(remote_code.__file__), Path(remote_layers.__file__)


@dataclass(frozen=True)
class ReleasedModel:
    """A trained model in the form that all formats of its release share.

    config: transformers' own, of the model as it is without binary layers. linears: by name, the Linears in the places
    of the binary layers, without values. layers: what a release stores of each. biases: theirs, in `dtype`. rest: all
    other tensors; those in floating point are in `dtype`.
    """

    config: PretrainedConfig
    binarize: BinarizeConfig
    dtype: torch.dtype
    linears: Mapping[str, FullLinear]
    layers: Mapping[str, StoredLayer]
    biases: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, config: PretrainedConfig, binarize: BinarizeConfig, weights: Mapping[str, Tensor], dtype: torch.dtype
    ) -> ReleasedModel:
        """From what a checkpoint holds (checkpoint_files.load_weights). A tied head is left out, if it is there."""
        lm = empty_model(config)
        linears = chosen_linears(lm, binarize, values_needed=False) if binarize.enabled else {}
        tied = lm.all_tied_weights_keys
        rest, biases, trained = {}, {}, {name: {} for name in linears}  # type: ignore[var-annotated]
        for name, tensor in weights.items():
            module, _, leaf = name.rpartition(".")
            if module in linears and leaf in TRAINED_NAMES:
                trained[module][leaf] = tensor
            elif name not in tied or tied[name] not in weights:
                kind = biases if module in linears else rest
                kind[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        layers = {name: pack_layer(binarize, tensors, dtype) for name, tensors in trained.items()}
        return cls(config, binarize, dtype, linears, layers, biases, rest)

    def dense_tensors(self) -> dict[str, Tensor]:
        """The tensors of the plain model with every ŵ written out, in the layout of its own modules."""
        tensors = {**self.rest, **self.biases}
        for name, linear in self.linears.items():
            weight_NK = self.layers[name].weight(linear.in_features, linear.out_features).to(self.dtype)
            tensors[f"{name}.weight"] = oriented(linear.module, weight_NK).contiguous()
        return tensors

    def packed_tensors(self) -> dict[str, Tensor]:
        """The tensors of the packed model: of its binary layers bits, fp32 scales and biases; the rest in dtype."""
        tensors = {**self.rest, **{name: bias.float() for name, bias in self.biases.items()}}
        for name, layer in self.layers.items():
            tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in layer.tensors.items()}
        return tensors

    @property
    def binary_weights(self) -> int:
        """How many weights the binary layers have, salient ones included."""
        return sum(linear.in_features * linear.out_features for linear in self.linears.values())

    @property
    def binary_bits(self) -> int:
        """What they take as packed: every tensor of theirs as it is stored, but for biases."""
        return 8 * sum(tensor.nbytes for layer in self.layers.values() for tensor in layer.tensors.values())

    @property
    def packed_config(self) -> PretrainedConfig:
        """The packed folder's config: the model's own fields, and what remote_code.BinaryModel builds its layers by."""
        layer = next(iter(self.layers.values()))
        own_options = {name: layer.own_options for name, layer in self.layers.items() if layer.own_options}
        bits_per_weight = self.binary_bits / self.binary_weights
        return packed_config(self.config, self.binarize, layer.kind, layer.options, own_options, bits_per_weight)


def plain_weights(
    lm: PreTrainedModel, binarize: BinarizeConfig, weights: Mapping[str, Tensor], share: float = 0.0
) -> dict[str, Tensor]:
    """A checkpoint's `weights` as those of `lm`, its model without binary layers: (1 - share)·W + share·ŵ in theirs.

    For runs with phases of precision: what such a layer computes where its binary share is `share`.
    """
    plain = dict(weights)
    for name, linear in chosen_linears(lm, binarize, values_needed=False).items():
        trained = {leaf: plain.pop(f"{name}.{leaf}") for leaf in TRAINED_NAMES if f"{name}.{leaf}" in plain}
        weight_NK = trained["weight"]
        if share > 0:
            binary_NK = pack_layer(binarize, trained, torch.float32).weight(linear.in_features, linear.out_features)
            weight_NK = torch.lerp(weight_NK, binary_NK, share)
        plain[f"{name}.weight"] = oriented(linear.module, weight_NK)
    return plain


def packed_config(
    config: PretrainedConfig,
    binarize: BinarizeConfig,
    layer: str,
    options: dict[str, Any],
    own_options: dict[str, dict[str, Any]],
    bits_per_weight: float,
) -> PretrainedConfig:
    """The config of the packed form of `config`'s model; see remote_code.BinaryModel for the other arguments."""
    config_class, model_class = binary_classes(config.model_type)
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    section = {
        "method": binarize.method,
        "layer": layer,
        "options": options,
        "own_options": own_options,
        "skip": list(binarize.skip),
    }
    if binarize.traits.salient:
        section["salient"] = asdict(binarize.salient)
    packed = config_class(**fields, binarize=section, bits_per_weight=bits_per_weight)
    packed.architectures = [model_class.__name__]
    packed.auto_map = auto_map(config_class, model_class)
    return packed


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The causal language model of `config` on the meta device: its modules without values."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def auto_map(config_class: type, model_class: type) -> dict[str, str]:
    """What tells transformers which classes of the folder's remote_code.py to use."""
    return {
        "AutoConfig": f"{REMOTE_CODE[0].stem}.{config_class.__name__}",
        "AutoModelForCausalLM": f"{REMOTE_CODE[0].stem}.{model_class.__name__}",
    }


def copy_remote_code(folder: Path) -> None:
    """Puts into a packed folder the code that loads it where fbitrain is not installed."""
    for file in REMOTE_CODE:
        shutil.copy(file, folder)


class BinaryModel(remote_code.BinaryModel):
    """A packed model on fbitrain's kernels: same folders, same tensors as the self-contained one."""

    layers = LAYERS

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the folder again loads where fbitrain is not installed."""
        assert isinstance(self, PreTrainedModel)
        self.config.auto_map = auto_map(type(self.config), type(self))
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        copy_remote_code(Path(save_directory))


def binary_classes(model_type: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """The packed config and model of transformers' architecture `model_type`, known to its Auto classes from now on."""
    base_config = CONFIG_MAPPING[model_type]
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    config_class = getattr(remote_code, PREFIX + base_config.__name__)
    if config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    members = {"__module__": __name__, "config_class": config_class}
    model_class = type(PREFIX + base_model.__name__, (BinaryModel, base_model), members)
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


def register(model_type: str) -> None:
    """Lets AutoModelForCausalLM load packed folders of an architecture: "fbitrain_gpt2", or "gpt2".

    A type that is not transformers' own is left to whoever asks for it.
    """
    base = model_type.removeprefix(MODEL_TYPE)
    if base in CONFIG_MAPPING and CONFIG_MAPPING[base] in MODEL_FOR_CAUSAL_LM_MAPPING:
        binary_classes(base)


BinaryLlamaConfig, BinaryLlamaForCausalLM = binary_classes("llama")
