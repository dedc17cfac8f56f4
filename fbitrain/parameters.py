"""What kinds of parameters a student has, and which of them decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from fbitrain.config import Config

SCALE_PARAMETERS = ("alpha", "beta", "scale_in", "scale_out", "router")  # what binary layers call them


def param_groups(config: Config, student: nn.Module) -> list[dict[str, Any]]:
    """Two AdamW groups: with weight decay, and the kinds that optim.no_decay exempts. Frozen parameters are in none."""
    kinds = parameter_kinds(student)
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (exempt if kinds[name] in config.optim.no_decay else decayed).append(parameter)
    groups = [
        {"name": "decay", "params": decayed, "weight_decay": config.optim.weight_decay},
        {"name": "no_decay", "params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Qualified name -> scales, norms, embeddings, biases or matrices, for every parameter (a shared one once)."""
    modules = dict(model.named_modules())
    kinds = {}
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        kinds[name] = _kind(modules[owner], leaf)
    return kinds


def _kind(owner: nn.Module, leaf: str) -> str:
    if leaf in SCALE_PARAMETERS:
        return "scales"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    return "biases" if leaf == "bias" else "matrices"


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO-3 has taken it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
