"""The runs of a study (study_file.py): which there are, what each waits for, what is noted beside it.

A seed draws the weights that are random and orders the data. A run that is finished is not run again, so a study that
was interrupted goes on where it was. Beside each run lies study.json: the configuration that it was started with, the
seconds it took over all attempts, and whether the last one failed.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fbitrain.base.errors import UserError
from fbitrain.base.files import read_json_lines, write_json
from fbitrain.config import Config, config_from, load_config, to_yaml
from fbitrain.studies.study_file import Setting, Study, Variant, slug

BITS_PER_BYTE = "heldout/bits_per_byte"


@dataclass(frozen=True)
class Run:
    """One variant with one seed, and with one setting of its grid if it has one; and the folder it lives in."""

    variant: Variant
    seed: int
    folder: Path
    setting: Setting | None = None

    @property
    def release(self) -> Path:
        """Where the run is released for those that learn from it."""
        return self.folder / "release"


def runs(study: Study, folder: Path) -> list[Run]:
    """Every run of a study, its first seeds first, so that a study cut short has something of everything."""
    each = [
        Run(variant, seed, folder / "-".join([*map(slug, names), f"seed{seed}"]), setting)
        for variant in study.variants
        for setting in variant.grid or (None,)
        for names in [[variant.name, setting.name] if setting else [variant.name]]
        for seed in variant.seeds
    ]
    return sorted(each, key=lambda run: run.variant.seeds.index(run.seed))


def runs_of(study: Study, folder: Path, name: str) -> list[Run]:
    """The runs of the variant called `name`."""
    return [run for run in runs(study, folder) if run.variant.name == name]


def teacher_of(study: Study, run: Run) -> Run | None:
    """The run that `run` learns from."""
    name = run.variant.teacher
    return runs_of(study, run.folder.parent, name)[0] if name else None


def is_teacher(study: Study, run: Run) -> bool:
    """Whether a variant of the study learns from `run`."""
    names = {variant.teacher for variant in study.variants}
    return run.variant.name in names and run.seed == run.variant.seeds[0]


def is_finished(run: Run) -> bool:
    return (run.folder / "FINISHED.json").is_file()


def waits_for(study: Study, run: Run, pending: Collection[Run] = ()) -> list[Run]:
    """The runs that have to end before `run` can begin: a grid's in success or failure, as long as one is finished.

    A run of `pending` that failed before is to be tried again.
    """
    waiting = []
    if name := run.variant.tuned_from:
        grid = runs_of(study, run.folder.parent, name)
        waiting += [each for each in grid if not is_finished(each) and (each in pending or not has_failed(each))]
        if not waiting and not any(map(is_finished, grid)):
            waiting += grid
    teacher = teacher_of(study, run)
    return waiting + ([teacher] if teacher and not is_finished(teacher) else [])


def best_setting(finished: dict[Setting, list[Run]]) -> Setting:
    """The setting with the fewest held-out bits per byte, by the median of its finished runs."""

    def median(setting: Setting) -> float:
        return statistics.median(or_infinite(last_of(run, BITS_PER_BYTE)) for run in finished[setting])

    return min(finished, key=median)


def finished_of_grid(study: Study, folder: Path, name: str) -> dict[Setting, list[Run]]:
    """Setting -> its finished runs, of the variant called `name`; settings without any are left out."""
    found: dict[Setting, list[Run]] = {}
    for run in runs_of(study, folder, name):
        if run.setting and is_finished(run):
            found.setdefault(run.setting, []).append(run)
    return found


def overrides(study: Study, run: Run) -> list[str]:
    """What `run` changes of the base. Raises UserError if it is tuned from a variant of which nothing is finished."""
    changes = list(run.variant.overrides)
    if name := run.variant.tuned_from:
        finished = finished_of_grid(study, run.folder.parent, name)
        if not finished:
            raise UserError(f"{run.folder.name} is tuned from {name!r}, of which no run is finished")
        changes += best_setting(finished).overrides
    if teacher := teacher_of(study, run):
        changes.append(f"distill.teacher={teacher.release / 'dense'}")
    if run.setting:
        changes += run.setting.overrides
    place = [f"run.dir={run.folder.parent}", f"run.name={run.folder.name}"]
    return [*changes, *place, f"train.seed={run.seed}", f"data.seed={run.seed}"]


def config_of(study: Study, run: Run) -> Config:
    """The resolved configuration. Raises ConfigError, and UserError as `overrides` does."""
    return load_config(study.base, overrides(study, run))


def begin(study: Study, run: Run) -> Config:
    """Notes the configuration that `run` is started with, and returns it. UserError if it was begun with another.

    A run is timed only if `end` followed each time that it was begun.
    """
    config = require_same_settings(study, run)
    noted = _noted(run)
    untimed = is_finished(run) or not noted.get("timed", True)
    seconds = math.nan if untimed else noted.get("seconds", 0.0)
    write_json(run.folder / "study.json", {"config": to_yaml(config), "seconds": seconds, "timed": False})
    return config


def end(run: Run, seconds: float, *, failed: bool = False) -> None:
    """Adds to the time that `run` took, and notes whether this attempt failed."""
    noted = _noted(run)
    write_json(
        run.folder / "study.json", {**noted, "seconds": noted["seconds"] + seconds, "timed": True, "failed": failed}
    )


def require_same_settings(study: Study, run: Run) -> Config:
    """The configuration of `run`; raises UserError if it was begun with another."""
    config = config_of(study, run)
    noted = _noted(run).get("config")
    # Fields that the program did not have when the run was begun have their defaults.
    if noted is not None and config_from(yaml.safe_load(noted), [])[0] != config:
        raise UserError(f"{run.folder} has other settings than the study now; remove it, or rename the variant")
    return config


def seconds_of(run: Run) -> float:
    """How long `run` took, over all attempts; NaN if one was not timed."""
    noted = _noted(run)
    return float(noted["seconds"]) if noted.get("timed") else math.nan


def has_failed(run: Run) -> bool:
    """Whether the last attempt at `run` ended before its last step."""
    return not is_finished(run) and bool(_noted(run).get("failed"))


def metrics_of(run: Run) -> Iterator[dict[str, Any]]:
    """The lines of its metrics.jsonl."""
    return read_json_lines(run.folder / "metrics.jsonl")


def last_of(run: Run, key: str) -> float:
    """The last value of `key` in the metrics of `run`. Raises UserError if there is none."""
    found = [line[key] for line in metrics_of(run) if key in line]
    if not found:
        raise UserError(
            f"{run.folder} has no {key} in its metrics; set data.heldout and eval.every in the study's base"
        )
    return float(found[-1])


def or_infinite(value: float) -> float:
    """A figure that is not finite is above all that are."""
    return value if math.isfinite(value) else math.inf


def _noted(run: Run) -> dict[str, Any]:
    path = run.folder / "study.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
