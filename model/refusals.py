"""What binarize_ refuses: one sentence that names the module and what to do about it.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fbitrain.base.errors import UserError
from fbitrain.model.config import BinarizeConfig, uses_groups
from fbitrain.model.methods import FullLinear


def check_skip(skip: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for an entry of binarize.skip that is none of the modules `names` nor the end of one."""
    known = list(dict.fromkeys([*names, *(name.rpartition(".")[2] for name in names)]))
    for entry in skip:
        if entry not in known:
            near = difflib.get_close_matches(entry, known, n=3) or known[-3:]
            raise UserError(f"binarize.skip has {entry!r}, but no Linear is called that; near names: {', '.join(near)}")


def skip_for_all(name: str) -> str:
    """The entry of binarize.skip for a module and its like in every block; an item of a list goes by its whole name."""
    last = name.rpartition(".")[2]
    return name if last.isdecimal() else last


def fused_modules(model: nn.Module) -> dict[str, str]:
    """Name -> parameter of each module that keeps several Linears in one tensor of three dimensions (MoE experts)."""
    found = {}
    for name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and not isinstance(module, _ConvNd):
                found[name] = parameter_name
    return found


def check_fused(fused: Mapping[str, str]) -> None:
    """Raises UserError for the first of `fused_modules` that binarize.skip has not taken out."""
    for name, parameter in fused.items():
        raise UserError(
            f"{name}.{parameter} holds the weights of several Linears in one tensor, which cannot be binarized; "
            f"add {skip_for_all(name)!r} to binarize.skip to keep all of that name in full precision"
        )


def check_linears(
    model: nn.Module, linears: Mapping[str, FullLinear], binarize: BinarizeConfig, *, values_needed: bool
) -> None:
    """Raises UserError if one of `linears`, by qualified name, cannot become a layer of binarize.method."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for name, linear in linears.items():
        _check_sharing(model, name, holders[id(linear.parameter)])
        if values_needed and not linear.has_values:
            raise UserError(f"the weight of {name} is not loaded (meta device, or partitioned); binarize a whole model")
        if not linear.parameter.is_floating_point():
            dtype = str(linear.parameter.dtype).removeprefix("torch.")
            raise UserError(f"the weight of {name} is {dtype}, already quantized; load the model in floating point")
        if uses_groups(binarize) and linear.in_features % binarize.group_size:
            raise UserError(
                f"{name} cannot be binarized: in_features={linear.in_features} is not a multiple of "
                f"group_size={binarize.group_size}; change binarize.group_size, or what is per group"
            )


def check_masks(
    linears: Mapping[str, FullLinear], binarize: BinarizeConfig, masks: Mapping[str, Tensor] | None
) -> None:
    """Raises UserError unless a method with salient weights has a fitting mask for each of `linears`."""
    if not binarize.traits.salient:
        return
    if masks is None:
        raise UserError(
            f"binarize.method={binarize.method} needs a trained model, of whose weights some are salient; "
            "set model.pretrained"
        )
    for name, linear in linears.items():
        _check_mask(name, linear, masks.get(name))


def _check_sharing(model: nn.Module, name: str, holders: Sequence[str]) -> None:
    for other in holders:
        if other != name:
            kind = "the embedding " if isinstance(model.get_submodule(other), nn.Embedding) else ""
            raise UserError(f"{name} shares its weight with {kind}{other}; add it to binarize.skip")


def _check_mask(name: str, linear: FullLinear, mask: Tensor | None) -> None:
    shape = (linear.out_features, linear.in_features)
    if mask is None:
        raise UserError(f"there is no mask of salient weights for {name}; select them for this model and binarize.skip")
    if mask.dtype != torch.bool or mask.shape != shape:
        raise UserError(
            f"the mask of {name} is {str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}, not bool "
            f"{list(shape)}; select the salient weights of this model"
        )
