"""What training does to signs, scales and routers, read between steps for a log line or an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fbitrain.model.method_table import SCALE_NAMES
from fbitrain.model.mixture import MixtureOfScalesLinear
from fbitrain.model.partial import PartialBinaryLinear
from fbitrain.model.signs import count_flips, sign_bits

if TYPE_CHECKING:
    from fbitrain.engine import Engine
    from fbitrain.shards import Fragment

LEARNED = tuple(f".{leaf}" for leaf in SCALE_NAMES)
SCALES = tuple(leaf for leaf in LEARNED if leaf != ".beta")  # of signs: one that is negative turns its weights over


class SignTracker:
    """Share of signs that flipped since the last look, and of undecided weights; each rank looks at its slices.

    Salient weights, which have no sign of one bit, are left out. layer_names: whose weight's own signs are its bits.
    """

    def __init__(self, engine: Engine, layer_names: Iterable[str], near_zero: float, device: torch.device) -> None:
        self._engine = engine
        self._layers = {f"{name}.weight": engine.student.lm.get_submodule(name) for name in layer_names}
        self._near_zero = near_zero
        self._device = device
        self._bits = {(f.name, f.start): sign_bits(self._ordinary(f)) for f in self._fragments()}

    def _fragments(self) -> Iterator[Fragment]:
        return (f for f in self._engine.shards.fragments() if f.name in self._layers)

    def _ordinary(self, fragment: Fragment) -> Tensor:
        """The fragment's weights, infinite where they are salient: a sign that never flips, and nowhere near zero."""
        layer = self._layers[fragment.name]
        if not isinstance(layer, PartialBinaryLinear):
            return fragment.weight
        salient = layer.salient_mask().flatten()[fragment.start : fragment.stop]
        return fragment.weight.masked_fill(salient.to(fragment.weight.device), torch.inf)

    def look(self) -> dict[str, float]:
        """Shares in [0, 1], total and per layer; nothing if there is no layer to look at. Collective."""
        if not self._layers:
            return {}
        index = {name: i for i, name in enumerate(self._layers)}
        counts = torch.zeros(3, len(index), dtype=torch.float64)  # flipped, near zero, all
        for fragment in self._fragments():
            weights = self._ordinary(fragment)
            key, bits = (fragment.name, fragment.start), sign_bits(weights)
            column = counts[:, index[fragment.name]]
            column[0] += count_flips(self._bits[key], bits).item()
            column[1] += (weights.abs() < self._near_zero).sum().item()
            column[2] += weights.isfinite().sum().item()
            self._bits[key] = bits
        counts = counts.to(self._device)
        dist.all_reduce(counts)
        flipped, near, total = counts.cpu()
        scalars = {
            "signs/flipped": (flipped.sum() / total.sum()).item(),
            "signs/near_zero": (near.sum() / total.sum()).item(),
        }
        for name, share in zip(self._layers, (flipped / total).tolist(), strict=True):
            scalars[f"signs_flipped/{name.removeprefix('model.').removesuffix('.weight')}"] = share
        return scalars


class ScaleTracker:
    """Share of the learned scales that are negative, and that changed their sign since the last look.

    A scale starts positive. One that changes its sign turns all of its weights over at once, which is what a learning
    rate too high for scales does.
    """

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine = engine
        self._device = device
        self._negative = {(f.name, f.start): f.weight < 0 for f in self._fragments()}
        self._any = any(name.endswith(SCALES) for name in engine.shards.shapes())

    def _fragments(self) -> Iterator[Fragment]:
        return (f for f in self._engine.shards.fragments() if f.name.endswith(SCALES))

    def look(self) -> dict[str, float]:
        """Shares in [0, 1]; nothing for a model without learned scales. Collective."""
        if not self._any:
            return {}
        counts = torch.zeros(3, dtype=torch.float64, device=self._device)  # negative, changed, all
        for fragment in self._fragments():
            key, negative = (fragment.name, fragment.start), fragment.weight < 0
            counts[0] += negative.sum()
            counts[1] += (negative != self._negative[key]).sum()
            counts[2] += negative.numel()
            self._negative[key] = negative
        dist.all_reduce(counts)
        negative_share, changed = (counts[:2] / counts[2]).tolist()
        return {"scales/negative": negative_share, "scales/sign_changes": changed}


def router_scalars(engine: Engine) -> dict[str, float]:
    """The routers' softmax weights since the last call: their mean entropy in nats, and each expert's mean weight.

    Means over tokens, layers and ranks. Empty if no layer has a router. Collective.
    """
    layers = [module for module in engine.student.modules() if isinstance(module, MixtureOfScalesLinear)]
    if not layers:
        return {}
    sums = torch.stack([layer.take_router_stats() for layer in layers]).sum(0).to(engine.device)
    dist.all_reduce(sums)
    entropy, tokens, *loads = sums.tolist()
    if not tokens:  # the layers are in full precision
        return {}
    return {"router/entropy": entropy / tokens} | {f"router/load_{i}": load / tokens for i, load in enumerate(loads)}


def gather_scales(engine: Engine) -> dict[str, Tensor]:
    """On rank 0 every learned scale and shift, whole and flat, by name; empty elsewhere. Collective; for histograms."""
    # Copies: a pickled view takes its whole flat buffer along.
    mine = [
        (f.name, f.start, f.weight.to("cpu", copy=True)) for f in engine.shards.fragments() if f.name.endswith(LEARNED)
    ]
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, everyone)
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for name, start, values in (piece for rank in everyone or () for piece in rank):
        pieces.setdefault(name, []).append((start, values))
    return {name: torch.cat([v for _, v in sorted(parts, key=lambda part: part[0])]) for name, parts in pieces.items()}
