"""Phases of precision in training: each step's binary share, and the scales where binarization begins.

Which share a step has is model/phases.py's, a function of its number: a resumed run needs no other memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fbitrain.model.config import BinarizeConfig
from fbitrain.model.latent import LatentLinear
from fbitrain.model.phases import binary_share, has_phases, scales_begin

if TYPE_CHECKING:
    from fbitrain.engine import Engine

IDLE = ("scales", "routers")  # kinds of parameters that full precision does not train


def enter_step(engine: Engine, binarize: BinarizeConfig, done: int) -> bool:
    """Before the forward pass of step `done` + 1: its share, and the scales' start where it is due. Collective.

    Returns whether the layers compute something else from here on, which is compiled anew.
    """
    if scales_begin(binarize, done):
        start_scales(engine, done)
    return set_share(engine, binarize, done + 1)


def set_share(engine: Engine, binarize: BinarizeConfig, step: int) -> bool:
    """Gives all layers the share of `step`; returns whether their phase changed. A run without phases has one."""
    if not has_phases(binarize):
        return False
    share = binary_share(binarize, step)
    phases = set()
    for _, layer in latent_layers(engine):
        phases.add(layer.phase)
        layer.set_binary_share(share)
        phases.add(layer.phase)
    if engine.config.train.compile and len(phases) > 1:
        # What was compiled for a phase that is over would count towards torch's limit of variants.
        torch.compiler.reset()
    return len(phases) > 1


@torch.no_grad()
def start_scales(engine: Engine, done: int) -> None:
    """Learned scales get the start values of the weights as they are after `done` steps. Collective.

    They are computed from the whole fp32 weights, so that they do not depend on the ranks or on ZeRO's stage.
    """
    layers = {f"{name}.weight": layer for name, layer in latent_layers(engine)}
    values: dict[str, Tensor] = {}
    for name, weight in engine.shards.whole_weights(list(layers)):
        for leaf, scales in layers[name].start_scales(weight).items():
            dist.broadcast(scales := scales.contiguous(), 0)
            values[f"{name.removesuffix('weight')}{leaf}"] = scales
    if values:
        # Until now scales and routers had no gradient. Their moments are zero, and AdamW's count begins with them.
        idle = [name for name in engine.shards.shapes() if engine.shards.kind(name) in IDLE]
        engine.shards.begin_state_anew(idle, done)
        engine.shards.overwrite(values, done)


def latent_layers(engine: Engine) -> list[tuple[str, LatentLinear]]:
    """The binary layers by qualified name in the language model."""
    modules = engine.student.lm.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, LatentLinear)]
