"""Packed binary language models in plain torch, needing nothing but torch and transformers.

This file and remote_layers.py are copied into every packed release, so that `from_pretrained(folder,
trust_remote_code=True)` works where fbitrain is not installed; therefore they import nothing of fbitrain. Where it is
installed, `fbitrain.model.hf` loads the same folders with its own kernels, in subclasses of the same layers.

A packed model is one of transformers' own whose Linears hold bits. Its classes are made when they are asked for: a
GPT-2's are BinaryGPT2Config and BinaryGPT2LMHeadModel (`__getattr__` at the end).
"""

from __future__ import annotations

from typing import Any, ClassVar

import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from .remote_layers import (
    PackedLinear,
    PackedMixtureLinear,
    PackedOneBitLinear,
    PackedPartialLinear,
    PackedTernaryLinear,
    PackedWeight,
)

MODEL_TYPE = "fbitrain_"  # and the model_type of the architecture that is packed
PREFIX = "Binary"  # and the name of the class that is packed


class BinaryModel:
    """What makes one of transformers' causal language models a packed one: stands before its class in the bases.

    config.binarize: `layer`, which of the classes in `layers` the Linears become; `options`, arguments that all of them
        have; `own_options`, by Linear's name, those that differ; `skip`, Linears that stay in full precision, by name
        or its last component; and how the model was trained.
    """

    layers: ClassVar[dict[str, type[PackedWeight]]] = {
        "binary": PackedLinear,
        "ternary": PackedTernaryLinear,
        "partial": PackedPartialLinear,
        "onebit": PackedOneBitLinear,
        "mixture": PackedMixtureLinear,
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        assert isinstance(self, nn.Module)
        if not config.binarize:
            raise ValueError("config.json has no binarize section, so this is not a packed fbitrain model")
        section = config.binarize
        for name, module in list(self.named_modules()):
            if {name, name.rpartition(".")[2]} & set(section["skip"]) or not isinstance(module, (nn.Linear, Conv1D)):
                continue
            n, k = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
            options = {**section["options"], **section["own_options"].get(name, {}), "bias": module.bias is not None}
            self.set_submodule(name, self.layers[section["layer"]](k, n, **options))

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a missing, unknown or damaged tensor is a ValueError, never a random weight."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        for problem in ("missing_keys", "unexpected_keys"):
            if names := sorted(info[problem]):
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise ValueError(f"the packed model's files do not fit its config.json: {problem} {shown}")
        for name, module in model.named_modules():
            if isinstance(module, PackedWeight):
                try:
                    module.check()
                except ValueError as error:
                    raise ValueError(f"the packed model's files are damaged: {name}.{error}") from None
        return (model, info) if output_loading_info else model


def __getattr__(name: str) -> Any:
    """The packed form of transformers' class of the same name without "Binary", made once."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = _config_class(base) if issubclass(base, transformers.PretrainedConfig) else _model_class(base)
    return globals().setdefault(name, made)


def _config_class(base: Any) -> type:
    """`base` with two fields more: binarize (see BinaryModel), and for information bits_per_weight, the stored bits per
    binary weight with scales."""
    fields = {"binarize": "dict[str, Any] | None", "bits_per_weight": "float | None"}
    members = {"__annotations__": fields, **dict.fromkeys(fields)}
    members |= {"__module__": __name__, "model_type": MODEL_TYPE + base.model_type}
    return type(PREFIX + base.__name__, (base,), members)


def _model_class(base: Any) -> type:
    name = PREFIX + base.config_class.__name__
    config_class = globals().get(name) or __getattr__(name)
    return type(PREFIX + base.__name__, (BinaryModel, base), {"__module__": __name__, "config_class": config_class})
