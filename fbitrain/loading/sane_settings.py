"""Which values of a config.json make no model, found before anything is built by them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fbitrain.base.errors import UserError

MAX_LAYERS = 4096  # a module is made for each before a single weight is read; no model has a tenth of them
MAX_SIZE = 2**31 - 1
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head", "num_heads"),
    *("num_key_value_heads", "head_dim"),
)
SECTIONS = ("text_config", "auto_map", "quantization_config", "binarize")
EXPERTS = re.compile(r"(num|n)_.*experts?$")


def require_sane(values: object, what: str) -> None:
    """Raises UserError for the first setting in the config.json of `what` that no model has."""
    if not isinstance(values, Mapping):
        raise UserError(f"{what} has a config.json that holds no settings; get it anew")
    for problem in _problems(values):
        raise UserError(f"{what} cannot be loaded: its config.json has {problem}; get it anew")


def _problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are missing or null are the architecture's to fill in."""
    for name in SECTIONS:
        if not isinstance(values.get(name) or {}, Mapping):
            yield f"{name}={values[name]!r:.80}, which is no section"
            return
    if not isinstance(values.get("model_type") or "", str):
        yield f"model_type={values['model_type']!r:.80}, which is no name"
    for section in (values, values.get("text_config") or {}):
        for name, value in section.items():
            most = MAX_LAYERS if name in LAYERS or EXPERTS.match(name) else MAX_SIZE if name in SIZES else 0
            least = 0 if EXPERTS.match(name) else 1
            if value is None or not most:
                continue
            if type(value) is not int or not least <= value <= most:
                yield f"{name}={value!r:.80}, which is no whole number from {least} to {most}"
            elif name == "head_dim" and value % 2:
                yield f"head_dim={value}, which is odd"
