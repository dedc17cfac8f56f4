"""What the files of a checkpoint hold, read by anyone: no DeepSpeed, no process group, no configuration.

Whoever reads has looked for damage first (checkpoint_marker): what is read here is what was written.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fbitrain.base.errors import UserError
from fbitrain.checkpoint_marker import FIXED, damage, require_sound
from fbitrain.spikes import RunningMeans

if TYPE_CHECKING:
    from fbitrain.data.sources.fingerprint import ShardList


@dataclass(frozen=True)
class TrainerState:
    """What the loop itself has to remember."""

    step: int = 0
    tokens: int = 0  # trained on, over all ranks
    means: RunningMeans = field(default_factory=RunningMeans)  # by which a step is judged


def trainer_state(folder: Path) -> TrainerState:
    """The loop's state at a complete checkpoint."""
    saved = json.loads((folder / "trainer.json").read_text())
    return TrainerState(saved["step"], saved["tokens"], RunningMeans(**saved.get("means", {})))


def data_states(folder: Path) -> tuple[list[dict[str, Any]], ShardList]:
    """Where the streams of all the ranks that saved stood, and the shards they read."""
    states = [json.loads(path.read_text()) for path in sorted(folder.glob("data_rank*.json"))]
    return states, json.loads((folder / "data_shards.json").read_text())


def load_weights(folder: Path) -> dict[str, Tensor]:
    """What a checkpoint holds of its language model, whole, on the CPU: name -> tensor. Needs no DeepSpeed.

    Trained parameters are fp32; what training never changes (`fixed_tensors`) comes as it was.
    Raises UserError if the folder is not a complete, undamaged checkpoint.
    """
    require_sound(folder, damage(folder))
    reader = ShardReader(folder)
    weights = {}
    for name, shape in _trained_shapes(folder).items():
        weights[name] = torch.empty(shape, dtype=torch.float32)
        reader.read_into(weights[name].view(-1), "weight", name, 0)
    return weights | fixed_tensors(folder)


def trained_parameters(folder: Path) -> int:
    """How many numbers of its model a checkpoint's run trains."""
    return sum(map(math.prod, _trained_shapes(folder).values()))


def fixed_tensors(folder: Path) -> dict[str, Tensor]:
    """The checkpoint's persistent buffers and frozen parameters; empty where its model has none."""
    return load_file(folder / FIXED) if (folder / FIXED).is_file() else {}


class ShardReader:
    """Finds any range of any parameter among the slices that a checkpoint's ranks wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards = [safe_open(path, framework="pt") for path in shard_files(folder)]
        self._slices: dict[tuple[str, str], list[tuple[int, int, str]]] = {}  # (kind, name) -> (start, shard, key)
        for index, shard in enumerate(self._shards):
            for key in shard.keys():  # noqa: SIM118 - not a dict
                kind, name, start = key.split("|")
                self._slices.setdefault((kind, name), []).append((int(start), index, key))

    def holds(self, kind: str, name: str) -> bool:
        """Whether the checkpoint has anything of this kind (`weight`, or a part of the optimizer's state)."""
        return (kind, name) in self._slices

    def read_into(self, target: Tensor, kind: str, name: str, start: int) -> None:
        """Copies elements [start, start + len(target)) of the flattened parameter into `target` [n]."""
        stop, filled = start + target.numel(), 0
        for left, index, key in self._slices.get((kind, name), ()):
            piece = self._shards[index].get_slice(key)
            right = left + piece.get_shape()[0]
            low, high = max(start, left), min(stop, right)
            if low < high:
                target[low - start : high - start].copy_(piece[low - left : high - left])
                filled += high - low
        if filled != target.numel():
            raise UserError(
                f"{self._folder} does not hold elements {start} to {stop} of {kind} {name}; it is not of this model"
            )


def _trained_shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = json.loads((folder / "trainer.json").read_text())["shapes"]
    return shapes


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard_rank*.safetensors"))
