"""A run's page in TensorBoard: which tag each key of metrics.jsonl gets, and what the other tabs show.

TensorBoard sorts groups of tags by name and opens the first two, so the names begin with a number. A group is what
stands before the first "/" of a tag.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fbitrain.config import Config, flatten
from fbitrain.step_clock import ACTIVITIES

OVERVIEW = {  # the first group's charts, which are sorted by name as well
    "train/loss": "1 loss",
    "heldout/bits_per_byte": "2 bits per byte",
    "speed/tokens_per_s": "3 tokens per s",
    "optim/lr": "4 learning rate",
    "signs/flipped": "5 signs flipped",
    "optim/grad_norm": "6 gradient norm",
}
GROUPS = {
    "2 losses": ("train", "heldout", "teacher"),
    "3 optimizer": ("optim", "lr", "update_ratio"),
    "4 signs and scales": ("signs", "scales", "router", "phase"),
    "5 speed and memory": ("speed", "memory", "model"),
    "5 step of the slowest and fastest rank": ("slowest_rank", "fastest_rank"),
    "6 data": ("data",),
}
GROUP_OF = {prefix: group for group, prefixes in GROUPS.items() for prefix in prefixes}
OTHER = "7 other"
PER_LAYER = "signs_flipped/"  # one key per layer: too many for a page of a large model
LOWEST, HIGHEST = "signs/flipped_lowest_layer", "signs/flipped_highest_layer"
SHOWN_BLOCKS = 8  # decoder blocks whose layers have charts of their own
EVENTS = "events.out.tfevents.*"


def tag_of(key: str) -> str:
    """The tag of a key of metrics.jsonl."""
    if key in OVERVIEW:
        return f"1 overview/{OVERVIEW[key]}"
    prefix, _, name = key.partition("/")
    if key.startswith(PER_LAYER):
        return f"8 signs flipped by layer/{name}"
    return f"{GROUP_OF.get(prefix, OTHER)}/{key}"


def histogram_tag(leaf: str, layer: str = "") -> str:
    """Of the scales called `leaf` (alpha, beta, …) in one layer, or in all layers together."""
    return f"9 {leaf} by layer/{layer}" if layer else f"4 signs and scales/{leaf} of all layers"


def block_of(name: str) -> int | None:
    """The decoder block of a layer, such as 3 of "layers.3.mlp.up_proj"; None outside the blocks."""
    return next((int(part) for part in re.split(r"[./]", name) if part.isdigit()), None)


def shown_blocks(names: Iterable[str]) -> set[int | None]:
    """The blocks whose layers are shown one by one: all, or SHOWN_BLOCKS from the first to the last, evenly spaced."""
    blocks = sorted({block for name in names if (block := block_of(name)) is not None})
    if len(blocks) > SHOWN_BLOCKS:
        blocks = [blocks[round(i * (len(blocks) - 1) / (SHOWN_BLOCKS - 1))] for i in range(SHOWN_BLOCKS)]
    return {None, *blocks}


def charts_of(scalars: Mapping[str, float]) -> dict[str, float]:
    """Tag -> value: the scalars without the layers that are not shown, with the extremes over all layers."""
    layers = {key: value for key, value in scalars.items() if key.startswith(PER_LAYER)}
    shown = shown_blocks(layers)
    charts = {key: value for key, value in scalars.items() if key not in layers or block_of(key) in shown}
    if layers:
        charts |= {LOWEST: min(layers.values()), HIGHEST: max(layers.values())}
    return {tag_of(key): value for key, value in charts.items()}


def histograms_of(scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tag -> values, of learned scales by name: each kind's over all layers, and those of the shown layers."""
    shown = shown_blocks(scales)
    together: dict[str, list[Tensor]] = {}
    histograms = {}
    for name, values in scales.items():
        layer, _, leaf = name.rpartition(".")
        together.setdefault(leaf, []).append(values)
        if block_of(name) in shown:
            histograms[histogram_tag(leaf, layer)] = values
    return {histogram_tag(leaf): torch.cat(parts) for leaf, parts in together.items()} | histograms


def layout() -> dict[str, dict[str, list[Any]]]:
    """The CUSTOM SCALARS tab: charts of several curves each. It is the same for all runs, or charts would come twice.

    A chart lists regular expressions of tags or, as Margin, the tags of a value and of its lower and upper bound.
    """

    def curves(*keys: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(tag_of(key))}$" for key in keys]]

    def all_of(prefix: str) -> list[Any]:
        return ["Multiline", [f"^{re.escape(tag_of(prefix))}"]]

    return {
        "Overview": {
            "losses": curves("train/loss", "train/label_ce", "heldout/nll"),
            "held-out bits per byte": curves("heldout/bits_per_byte"),
            "tokens per second": curves("speed/tokens_per_s"),
            "learning rates": all_of("lr/"),
            "signs flipped, between the lowest and the highest layer": [
                "Margin",
                [tag_of("signs/flipped"), tag_of(LOWEST), tag_of(HIGHEST)],
            ],
            "loss against the teacher, and its lower bound": curves("train/kd", "teacher/entropy"),
        },
        "Optimizer": {
            "gradient norm": curves("optim/grad_norm"),
            "size of updates": all_of("update_ratio/"),
            "scales that are negative or changed their sign": curves("scales/negative", "scales/sign_changes"),
        },
        "Speed": {
            "seconds of work in a step, slowest and fastest rank": curves(
                "slowest_rank/working_s", "fastest_rank/working_s"
            ),
            "where the slowest rank's step goes": curves(*(f"slowest_rank/{name}_s" for name in ACTIVITIES)),
            "where the fastest rank's step goes": curves(*(f"fastest_rank/{name}_s" for name in ACTIVITIES)),
        },
        "Data": {
            "tokens by source": all_of("data/tokens/"),
            "epochs by source": all_of("data/epochs/"),
        },
    }


def hyperparameters(config: Config) -> dict[str, bool | float | str]:
    """The configuration as the HPARAMS tab takes it: numbers, texts and, for lists and empty values, JSON."""
    leaves = {key: value for key, value in flatten(config).items() if not key.startswith("run.")}
    return {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in leaves.items()}


class TensorBoardPage:
    """The event files of a run, in RUN/tensorboard/NAME: TensorBoard calls a run by its folder below --logdir.

    Events after `step` are hidden: a resumed run repeats those steps. At step 0 earlier events are deleted.
    """

    def __init__(self, config: Config, step: int) -> None:
        folder = event_folder(config.run_dir, step)
        threading.excepthook = _quiet
        self._events = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)
        self._events.add_custom_scalars(layout())
        # After a resume TensorBoard still shows the first configuration.
        writer: Any = self._events.file_writer
        writer.add_summary(hparams.hparams_pb(hyperparameters(config), trial_id=config.run.name))

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for tag, value in charts_of(scalars).items():
            self._events.add_scalar(tag, value, step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._events.add_text(name, f"```\n{text}\n```", step)

    def histograms(self, step: int, scales: Mapping[str, Tensor]) -> None:
        """scales: fp32, flat, by the parameter's name."""
        finite = {name.removeprefix("model."): tensor for name, tensor in scales.items() if tensor.isfinite().all()}
        for tag, values in histograms_of(finite).items():
            self._events.add_histogram(tag, values.numpy(), step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def _quiet(failure: threading.ExceptHookArgs, show: Any = threading.excepthook) -> None:
    """Leaves out the traceback of an event writer's thread: the next call of the writer raises the same OSError."""
    if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__ == EventFileWriter.__module__):
        show(failure)


def event_folder(run_dir: Path, step: int) -> Path:
    """Where events go from `step` on.

    Events that lie elsewhere, because the run folder was renamed or copied, are moved: a run appears once.
    """
    folder = run_dir / "tensorboard" / run_dir.name
    for events in sorted(folder.parent.rglob(EVENTS)):
        if step == 0:
            events.unlink()
        elif events.parent != folder:
            folder.mkdir(exist_ok=True)
            events.rename(folder / events.name)
    return folder
