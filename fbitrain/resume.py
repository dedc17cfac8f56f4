"""Going on from a checkpoint: what may differ from the run that wrote it, and its weights and state for an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fbitrain.base.errors import UserError
from fbitrain.checkpoint_files import ShardReader
from fbitrain.config import Config, differences, load_config
from fbitrain.model.phases import binary_share

if TYPE_CHECKING:
    from fbitrain.engine import Engine

# Keys that may differ between a checkpoint and the run that resumes it. The rest decides what the numbers mean.
_FREE_SECTIONS = ("run.", "engine.", "checkpoint.", "metrics.", "eval.", "debug.", "optim.", "distill.")
# The stream itself compares sources by their shards' names and sizes and tokenizers by what they do, wherever they lie.
_FREE_KEYS = (
    "train.",
    "data.n_workers",
    "data.max_bad_records",
    "data.heldout",
    "data.skip_steps",
    "data.sources",
    "data.phases",
    "data.pretokenized",
    "data.duplicates",
    "data.cache_",
    "data.tokenizer",
    "model.preset",
)

_FIXED_KEYS = ("train.frozen",)  # of the free sections: a checkpoint has no optimizer state of what it did not train

# May differ, too, while a run is in full precision under the old values and the new.
PHASE_KEYS = ("binarize.from_step", "binarize.anneal_steps")


def require_same_config(folder: Path, new: Config) -> str:
    """Compares the checkpoint's configuration with `new`; returns a sentence on allowed differences worth saying.

    Raises UserError naming the keys that differ and decide what weights and stream mean.
    """
    trainer = json.loads((folder / "trainer.json").read_text())
    step, old = trainer["step"], load_config(folder / "config.yaml", world_size=trainer["world_size"])
    changed = differences(old, new)
    free = (*_FREE_SECTIONS, *_FREE_KEYS)
    forbidden = {k: v for k, v in changed.items() if k in _FIXED_KEYS or not k.startswith(free)}
    if binary_share(old.binarize, step) == 0 == binary_share(new.binarize, step):
        forbidden = {k: v for k, v in forbidden.items() if k not in PHASE_KEYS}
    if forbidden:
        listed = ", ".join(f"{key} ({was!r} there, {now!r} here)" for key, (was, now) in forbidden.items())
        if not forbidden.keys().isdisjoint(PHASE_KEYS):
            listed += ", and they may change only before binarization begins"
        raise UserError(
            f"{folder} belongs to another configuration: {listed}; restore these values or choose another run.name"
        )
    told = ("optim.", "distill.", "train.", *PHASE_KEYS)
    worth_saying = [k for k in changed if k.startswith(told) and k != "train.resume"]
    listed = ", ".join(f"{key} {changed[key][0]!r} -> {changed[key][1]!r}" for key in worth_saying)
    return f"resuming with changed settings: {listed}" if listed else ""


def restore(engine: Engine, folder: Path, on_change: str) -> str:
    """Reads this rank's slices of weights and optimizer state; `engine.shards.changed` then makes them count.

    Parameters whose optimizer state is not in the checkpoint, because another optimizer wrote it, are refused, or with
    on_change=restart begin with none; returns a sentence on those, the same on every rank.

    Raises UserError if the checkpoint does not hold a parameter of this model.
    """
    reader = ShardReader(folder)
    fresh = [
        name for name, kinds in engine.shards.state_kinds().items() if not all(reader.holds(k, name) for k in kinds)
    ]
    of_whom = f"{len(fresh)} parameters, {fresh[0]} among them" if fresh else ""
    if fresh and on_change == "refuse":
        raise UserError(
            f"{folder} was written by another optimizer and holds no state of this one for {of_whom}; "
            "restore optim.optimizer, or set optim.on_change=restart to begin their state anew"
        )
    saved = json.loads((folder / "trainer.json").read_text())
    engine.shards.state_starts = saved.get("state_starts", {})
    engine.shards.begin_state_anew(fresh, saved["step"])
    for fragment in engine.shards.fragments(everything_local=True):
        reader.read_into(fragment.weight, "weight", fragment.name, fragment.start)
        for kind, values in fragment.state.items() if fragment.name not in fresh else ():
            reader.read_into(values, kind, fragment.name, fragment.start)
    return f"the optimizer's state of {of_whom}, begins anew: another optimizer wrote the checkpoint" if fresh else ""
