"""What kinds of parameters a student has (config_optim.KINDS): each kind has a learning rate and a weight decay."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from transformers.pytorch_utils import Conv1D

from fbitrain.model.latent import LatentLinear
from fbitrain.model.method_table import SCALE_NAMES
from fbitrain.student import LossHead


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Qualified name -> kind of every parameter. A head that is tied to the embeddings comes once, as embeddings."""
    modules = dict(model.named_modules())
    kinds = {}
    for name, _ in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        kinds[name] = _kind(modules[owner], leaf)
    return kinds


def is_transposed(model: nn.Module, name: str) -> bool:
    """Whether the matrix `name` is [in_features, out_features]: GPT-2's Conv1D, where it has not become binary."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D)


def _kind(owner: nn.Module, leaf: str) -> str:
    if leaf in SCALE_NAMES:
        return "scales"
    if leaf == "router":
        return "routers"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if isinstance(owner, LossHead):
        return "head"
    if leaf == "weight" and isinstance(owner, (LatentLinear, nn.Linear, Conv1D)):
        return "matrices"
    return "biases" if leaf == "bias" else "others"


def freeze_(model: nn.Module, frozen: Collection[str]) -> str:
    """Takes the parameters of the kinds `frozen` out of training; a line that says how many are left and which not.

    It comes before ZeRO takes parameters apart.
    """
    parameters = dict(model.named_parameters())
    counts = dict.fromkeys(frozen, 0)
    for name, kind in parameter_kinds(model).items():
        if kind in frozen:
            parameters[name].requires_grad_(False)
            counts[kind] += parameters[name].numel()
    total = sum(parameter.numel() for parameter in parameters.values())
    told = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return f"training {total - sum(counts.values()):,} of {total:,} parameters; frozen: {told}"


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The parameter's shape, also where ZeRO-3 has taken it apart."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
