"""A study: one configuration in many variants and seeds, run one after another, and what came of each.

    base: launch/studies/smollm2.yaml       the configuration that every variant starts from
    seeds: [0, 1]
    variants:
      - name: PB-LLM, 10 %, Hessian
        set: [binarize.method=partial, binarize.salient.criterion=hessian]
        seeds: [0]                          where the seed changes nothing
    expect:                                 orderings of the held-out perplexity that the papers claim
      - [PB-LLM 10 % Hessian, PB-LLM 10 % magnitude]

A seed draws the weights that are random and orders the data. A variant whose run is finished is not run again, so a
study that was interrupted goes on where it was. Beside each run lies study.json: the configuration that it was started
with, and the seconds it took, over all attempts.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fbitrain.config import load_config, to_yaml
from fbitrain.errors import UserError
from fbitrain.files import read_json_lines, write_json

PERPLEXITY = "heldout/perplexity"


@dataclass(frozen=True)
class Variant:
    """What is changed of the base configuration, and with which seeds it runs."""

    name: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """What a study file says. `expected` holds pairs of names: the first is to have the lower perplexity."""

    base: str
    variants: tuple[Variant, ...]
    expected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Run:
    """One variant with one seed, and the folder it lives in."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def overrides(self) -> list[str]:
        place = [f"run.dir={self.folder.parent}", f"run.name={self.folder.name}"]
        return [*self.variant.overrides, *place, f"train.seed={self.seed}", f"data.seed={self.seed}"]

    def config(self, base: str) -> str:
        """The resolved configuration as YAML. Raises ConfigError."""
        return to_yaml(load_config(base, self.overrides))


@dataclass(frozen=True)
class Outcome:
    """A variant's results: per seed where there are several."""

    name: str
    perplexities: tuple[float, ...]
    bits_per_weight: float
    tokens: int
    seconds: float  # the median over seeds, start to end; NaN if a run was not timed

    @property
    def perplexity(self) -> float:
        return statistics.median(self.perplexities)


def load_study(path: Path) -> Study:
    """Reads a study file; raises UserError with every problem in it."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the study {path} cannot be read: {' '.join(str(error).split())}") from None
    problems = list(_problems(raw))
    if problems:
        raise UserError(f"the study {path} has mistakes: {'; '.join(problems)}")
    variants = tuple(
        Variant(item["name"], tuple(item.get("set", ())), tuple(item.get("seeds") or raw["seeds"]))
        for item in raw["variants"]
    )
    return Study(raw["base"], variants, tuple((low, high) for low, high in raw.get("expect") or ()))


def runs(study: Study, folder: Path) -> list[Run]:
    """Every run of a study, its first seeds first, so that a study cut short has something of everything."""
    each = [
        Run(variant, seed, folder / f"{slug(variant.name)}-seed{seed}")
        for variant in study.variants
        for seed in variant.seeds
    ]
    return sorted(each, key=lambda run: run.variant.seeds.index(run.seed))


def slug(name: str) -> str:
    """A name as a folder may have it."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def is_finished(run: Run) -> bool:
    return (run.folder / "FINISHED.json").is_file()


def begin(run: Run, base: str) -> None:
    """Notes the configuration that `run` is started with. Raises UserError if it was begun with another.

    A run is timed only if `add_seconds` followed each time that it was begun.
    """
    _require_same_settings(run, base)
    noted = _noted(run)
    untimed = is_finished(run) or not noted.get("timed", True)
    seconds = math.nan if untimed else noted.get("seconds", 0.0)
    write_json(run.folder / "study.json", {"config": run.config(base), "seconds": seconds, "timed": False})


def add_seconds(run: Run, seconds: float) -> None:
    """Adds to the time that `run` took."""
    noted = _noted(run)
    write_json(run.folder / "study.json", {**noted, "seconds": noted["seconds"] + seconds, "timed": True})


def outcomes(study: Study, folder: Path) -> list[Outcome]:
    """The results of the variants that have a finished run, in the order of the study, by their finished runs.

    Raises UserError for a run with other settings than the study has now.
    """
    by_name: dict[str, list[Run]] = {}
    for run in runs(study, folder):
        by_name.setdefault(run.variant.name, []).append(run)
    finished = [some for variant in study.variants if (some := list(filter(is_finished, by_name[variant.name])))]
    for run in (run for some in finished for run in some):
        _require_same_settings(run, study.base)
    return [_outcome(some) for some in finished]


def verdicts(study: Study, results: Sequence[Outcome]) -> Iterator[tuple[str, str, str]]:
    """(lower, higher, verdict) of each expected ordering.

    It holds if every seed of the one is below every seed of the other, and fails if every seed is above; else the two
    cannot be told apart. A perplexity that is not finite is above all that are.
    """
    by_name = {outcome.name: [_or_infinite(value) for value in outcome.perplexities] for outcome in results}
    for low, high in study.expected:
        if low not in by_name or high not in by_name:
            yield low, high, "not run"
            continue
        lows, highs = by_name[low], by_name[high]
        alone = " (one run each)" if len(lows) == len(highs) == 1 else ""
        if max(lows) < min(highs):
            yield low, high, "holds" + alone
        elif min(lows) > max(highs):
            yield low, high, "does not hold" + alone
        else:
            yield low, high, "cannot be told apart"


def _or_infinite(perplexity: float) -> float:
    return perplexity if math.isfinite(perplexity) else math.inf


def _require_same_settings(run: Run, base: str) -> None:
    config = run.config(base)
    if _noted(run).get("config", config) != config:
        raise UserError(f"{run.folder} has other settings than the study now; remove it, or rename the variant")


def _seconds(run: Run) -> float:
    noted = _noted(run)
    return float(noted["seconds"]) if noted.get("timed") else math.nan


def _noted(run: Run) -> dict[str, Any]:
    path = run.folder / "study.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _outcome(some: Sequence[Run]) -> Outcome:
    lines = [list(read_json_lines(run.folder / "metrics.jsonl")) for run in some]
    return Outcome(
        some[0].variant.name,
        tuple(_last(run, line, PERPLEXITY) for run, line in zip(some, lines, strict=True)),
        _last(some[0], lines[0], "model/bits_per_weight"),
        max(int(line[-1]["tokens"]) for line in lines),
        statistics.median(map(_seconds, some)),
    )


def _last(run: Run, lines: Sequence[Mapping[str, Any]], key: str) -> float:
    found = [line[key] for line in lines if key in line]
    if not found:
        raise UserError(
            f"{run.folder} has no {key} in its metrics; set data.heldout and eval.every in the study's base"
        )
    return float(found[-1])


def _problems(raw: Any) -> Iterator[str]:
    if not isinstance(raw, dict) or not isinstance(raw.get("base"), str) or not isinstance(raw.get("variants"), list):
        yield "it must have base: (a configuration file), seeds: and variants:"
        return
    if unknown := sorted(set(map(str, raw)) - {"base", "seeds", "variants", "expect"}):
        yield f"unknown keys {', '.join(unknown)}"
    names: list[str] = []
    for i, item in enumerate(raw["variants"]):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not slug(item["name"]):
            yield f"variants[{i}] has no name"
            continue
        yield from _variant_problems(item, raw.get("seeds"), names)
        names.append(item["name"])
    pairs = raw.get("expect") or []
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2:
            yield f"expect: {pair!r} is not a pair of names"
            continue
        yield from (f"expect: no variant is called {name!r}" for name in pair if name not in names)


def _variant_problems(item: Mapping[str, Any], seeds: Any, earlier: Sequence[str]) -> Iterator[str]:
    name, own = item["name"], item.get("seeds", seeds)
    if slug(name) in map(slug, earlier):
        yield f"two variants are called {name!r}"
    if not isinstance(own, list) or not own or not all(isinstance(seed, int) for seed in own):
        yield f"variant {name!r} has no list of seeds"
    overrides = item.get("set", [])
    if not isinstance(overrides, list) or not all(isinstance(override, str) for override in overrides):
        yield f"set: of variant {name!r} is not a list of section.key=value"
    if unknown := sorted(set(map(str, item)) - {"name", "set", "seeds"}):
        yield f"variant {name!r} has unknown keys {', '.join(unknown)}"
