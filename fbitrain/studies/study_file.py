"""A study file: variants of one configuration, how they are tuned, what is expected of them and what is drawn.

    base: launch/studies/recipes_base.yaml      the configuration that every variant starts from
    seeds: [0]
    sets:                                       overrides by name: $muon in a variant's set stands for them
      muon: [optim.optimizer=muon]
    grids:                                      values to choose from, by name; several keys go along, first with first
      muon: {optim.muon.lr: [0.01, 0.02, 0.04]}
    variants:
      - name: binary, Muon
        set: [$muon, train.total_steps=1000]
        grid: muon                              or a grid of its own; a run per value and seed
      - name: binary, Muon, 5000 steps
        set: [$muon, train.total_steps=5000]
        tuned_from: binary, Muon                has the value of that grid that came out best
        seeds: [0, 1, 2]
      - name: distilled
        set: [distill.kd_weight=1, distill.ce_weight=0]
        teacher: full precision                 learns from that variant's run of the first seed, released as dense
    expect:                                     pairs: the first is claimed to have fewer held-out bits per byte
      - [binary, Muon 5000 steps, distilled]
    plots:                                      curves over training tokens, and their distance to one of them
      small: {reference: full precision, groups: {full precision: [...], "binary, Muon": [...]}}

A variant may only name variants that stand before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fbitrain.base.errors import UserError

KEYS = {"base", "seeds", "sets", "grids", "variants", "expect", "plots"}
VARIANT_KEYS = {"name", "set", "seeds", "grid", "tuned_from", "teacher"}


@dataclass(frozen=True)
class Setting:
    """One place of a grid. `name` is the value of the grid's first key."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Variant:
    """What is changed of the base configuration, and with which seeds it runs."""

    name: str
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: tuple[Setting, ...] = ()
    grid_key: str = ""  # the grid's first key
    tuned_from: str = ""  # the variant whose best setting this one has
    teacher: str = ""  # the variant whose run this one learns from


@dataclass(frozen=True)
class Plot:
    """Curves of bits per byte over training tokens. A group is a curve: its name, and the names of its variants."""

    name: str
    reference: str  # the group that the others' distance is measured from; empty: no picture of distances
    groups: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Study:
    """What a study file says. `expected` holds pairs of names: the first is to have fewer bits per byte."""

    base: str
    variants: tuple[Variant, ...]
    expected: tuple[tuple[str, str], ...]
    plots: tuple[Plot, ...] = ()

    def variant(self, name: str) -> Variant:
        return next(variant for variant in self.variants if variant.name == name)


def load_study(path: Path) -> Study:
    """Reads a study file; raises UserError with every problem in it."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"the study {path} cannot be read: {' '.join(str(error).split())}") from None
    problems = list(_problems(raw))
    if problems:
        raise UserError(f"the study {path} has mistakes: {'; '.join(problems)}")
    plots = tuple(
        Plot(name, plot.get("reference", ""), tuple((group, tuple(names)) for group, names in plot["groups"].items()))
        for name, plot in (raw.get("plots") or {}).items()
    )
    variants = tuple(_variant(item, raw) for item in raw["variants"])
    return Study(raw["base"], variants, tuple((low, high) for low, high in raw.get("expect") or ()), plots)


def slug(name: str) -> str:
    """A name as a folder may have it."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")


def _variant(item: Mapping[str, Any], raw: Mapping[str, Any]) -> Variant:
    sets = raw.get("sets") or {}
    overrides = [
        each for entry in item.get("set", ()) for each in (sets[entry[1:]] if entry.startswith("$") else [entry])
    ]
    grid = item.get("grid") or {}
    grid = raw["grids"][grid] if isinstance(grid, str) else grid
    settings = tuple(
        Setting(str(values[0]), tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True)))
        for values in zip(*grid.values(), strict=True)
    )
    return Variant(
        name=item["name"],
        overrides=tuple(overrides),
        seeds=tuple(item.get("seeds") or raw["seeds"]),
        grid=settings,
        grid_key=next(iter(grid), ""),
        tuned_from=item.get("tuned_from", ""),
        teacher=item.get("teacher", ""),
    )


def _problems(raw: Any) -> Iterator[str]:
    if not isinstance(raw, dict) or not isinstance(raw.get("base"), str) or not isinstance(raw.get("variants"), list):
        yield "it must have base: (a configuration file), seeds: and variants:"
        return
    if unknown := sorted(set(map(str, raw)) - KEYS):
        yield f"unknown keys {', '.join(unknown)}"
    for section in ("sets", "grids", "plots"):
        if not isinstance(raw.get(section) or {}, dict):
            yield f"{section}: has no names"
            return
    for name, overrides in (raw.get("sets") or {}).items():
        if not _is_overrides(overrides):
            yield f"sets: {name!r} is not a list of section.key=value"
    for name, grid in (raw.get("grids") or {}).items():
        yield from _grid_problems(grid, f"grids: {name!r}")
    earlier: list[Mapping[str, Any]] = []
    for i, item in enumerate(raw["variants"]):
        if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not slug(item["name"]):
            yield f"variants[{i}] has no name"
            continue
        yield from _variant_problems(item, raw, [before["name"] for before in earlier])
        yield from _origin_problems(item, earlier)
        earlier.append(item)
    names = [item["name"] for item in earlier]
    yield from _expectation_problems(raw.get("expect") or [], names)
    for name, plot in (raw.get("plots") or {}).items():
        yield from _plot_problems(name, plot, names)


def _variant_problems(item: Mapping[str, Any], raw: Mapping[str, Any], earlier: Sequence[str]) -> Iterator[str]:
    name, own = item["name"], item.get("seeds", raw.get("seeds"))
    if slug(name) in map(slug, earlier):
        yield f"two variants are called {name!r}"
    if not isinstance(own, list) or not own or not all(isinstance(seed, int) for seed in own):
        yield f"variant {name!r} has no list of seeds"
    overrides = item.get("set", [])
    if not _is_overrides(overrides):
        yield f"set: of variant {name!r} is not a list of section.key=value"
    else:
        for entry in overrides:
            if entry.startswith("$") and entry[1:] not in (raw.get("sets") or {}):
                yield f"variant {name!r} has {entry}, but sets: has no {entry[1:]}"
    grid = item.get("grid") or {}
    if isinstance(grid, str):
        if grid not in (raw.get("grids") or {}):
            yield f"variant {name!r} has grid: {grid}, but grids: has no {grid}"
    elif "grid" in item:
        yield from _grid_problems(grid, f"grid: of variant {name!r}")
    if unknown := sorted(set(map(str, item)) - VARIANT_KEYS):
        yield f"variant {name!r} has unknown keys {', '.join(unknown)}"


def _origin_problems(item: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What is wrong with the variants that this one says it follows from."""
    before = {other["name"]: other for other in earlier}
    for key in ("tuned_from", "teacher"):
        if key in item and item[key] not in before:
            yield f"{key}: of variant {item['name']!r} is {item[key]!r}, and no variant before it is called so"
    if item.get("tuned_from") in before and "grid" not in before[item["tuned_from"]]:
        yield f"variant {item['name']!r} is tuned from {item['tuned_from']!r}, which has no grid:"
    if "tuned_from" in item and "grid" in item:
        yield f"variant {item['name']!r} has both grid: and tuned_from:; leave one out"
    if item.get("teacher") in before and "grid" in before[item["teacher"]]:
        yield f"the teacher of variant {item['name']!r} has a grid:; make a variant that is tuned_from: it"


def _grid_problems(grid: Any, where: str) -> Iterator[str]:
    lists = list(grid.values()) if isinstance(grid, dict) else []
    if not lists or not all(isinstance(values, list) and values for values in lists):
        yield f"{where} is not section.key: [values]"
    elif len({len(values) for values in lists}) > 1:
        yield f"{where} has lists of different lengths; its keys go along, first value with first value"
    elif len({slug(str(value)) for value in lists[0]}) < len(lists[0]):
        yield f"{where} has a value twice"


def _expectation_problems(pairs: Any, names: Sequence[str]) -> Iterator[str]:
    for pair in pairs if isinstance(pairs, list) else [pairs]:
        if not isinstance(pair, list) or len(pair) != 2:
            yield f"expect: {pair!r} is not a pair of names"
            continue
        yield from (f"expect: no variant is called {name!r}" for name in pair if name not in names)


def _plot_problems(name: Any, plot: Any, names: Sequence[str]) -> Iterator[str]:
    groups = plot.get("groups") if isinstance(plot, dict) else None
    if (
        not isinstance(name, str)
        or not slug(name)
        or not isinstance(groups, dict)
        or not all(isinstance(members, list) for members in groups.values())
        or set(plot) - {"reference", "groups"}
    ):
        yield f"plots: {name!r} is not groups: with lists of variants, and perhaps reference:"
        return
    if plot.get("reference", "") not in ("", *groups):
        yield f"plots: the reference {plot['reference']!r} of {name!r} is none of its groups"
    for group, members in groups.items():
        strangers = [each for each in members if each not in names]
        yield from (f"plots: {group!r} names {each!r}, and no variant is called so" for each in strangers)


def _is_overrides(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(override, str) for override in value)
