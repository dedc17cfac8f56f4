"""Who reads what: shards cut into units, units dealt to lanes. Fixed for a whole run, whatever the number of ranks."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fbitrain.data.config import DataConfig
from fbitrain.data.shards import JSONL_SUFFIXES, TEXT_SUFFIXES, DataError, Shard, find_shards

# With this many units of equal size per lane, no lane gets more than about a quarter above its share of a source.
UNITS_PER_LANE = 4


@dataclass(frozen=True)
class Unit:
    """The lines `part`, `part + n_parts`, … of one shard."""

    shard: Shard
    part: int
    n_parts: int

    @property
    def size(self) -> float:
        """Bytes on disk that are this unit's share of the shard."""
        return self.shard.size / self.n_parts


@dataclass(frozen=True)
class SourcePlan:
    """What one lane reads of one source."""

    name: str
    weight: float
    text_key: str
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class LanePlan:
    """All that one lane needs to know to produce its stream."""

    lane: int
    sources: tuple[SourcePlan, ...]
    seq_len: int
    seed: int
    add_bos: bool
    add_eos: bool
    max_bad_records: int


def find_sources(data: DataConfig) -> dict[str, list[Shard]]:
    """The shards of every source, by its name. Raises DataError for a missing one, and for one that is held out."""
    found = {source.name: find_shards(source.paths, source.name) for source in data.sources}
    heldout = find_shards(data.heldout, "heldout", JSONL_SUFFIXES + TEXT_SUFFIXES) if data.heldout else []
    held = {shard.path for shard in heldout}
    for name, shards in found.items():
        for shard in shards:
            if shard.path in held:
                raise DataError(
                    f"{shard.path} is both held out and part of source {name!r}; "
                    "take it out of data.heldout or data.sources"
                )
    return found


def plan_lanes(data: DataConfig, sources: dict[str, list[Shard]]) -> list[LanePlan]:
    """One plan per lane. Every line of every shard is in exactly one unit, and every unit in exactly one lane."""
    dealt = {
        source.name: deal(cut(sources[source.name], data.n_lanes), data.n_lanes, f"{data.seed}/{source.name}")
        for source in data.sources
    }
    return [
        LanePlan(
            lane=lane,
            sources=tuple(
                SourcePlan(source.name, source.weight, source.text_key, tuple(dealt[source.name][lane]))
                for source in data.sources
            ),
            seq_len=data.seq_len,
            seed=data.seed,
            add_bos=data.add_bos,
            add_eos=data.add_eos,
            max_bad_records=data.max_bad_records,
        )
        for lane in range(data.n_lanes)
    ]


def cut(shards: Sequence[Shard], n_lanes: int) -> list[Unit]:
    """Shards as units of about equal size, at least one per lane; a large shard is split by line number.

    Every part of a shard is read by going through all its lines, so shards are split no further than the dealing needs.
    """
    target = sum(shard.size for shard in shards) / (n_lanes * UNITS_PER_LANE)
    units = []
    for shard in shards:
        n_parts = min(max(1, math.ceil(shard.size / target)), n_lanes) if target else 1
        units += [Unit(shard, part, n_parts) for part in range(n_parts)]
    return units


def deal(units: Sequence[Unit], n_lanes: int, seed: str) -> list[list[Unit]]:
    """Largest unit first to the lane that has least (Graham's LPT rule), ties in seeded order."""
    largest_first = sorted(
        range(len(units)), key=lambda i: (-units[i].size, shuffle_key(seed, units[i].shard.name, units[i].part))
    )
    lanes = [(0.0, shuffle_key(seed, "lane", lane), lane) for lane in range(n_lanes)]
    heapq.heapify(lanes)
    dealt: list[list[Unit]] = [[] for _ in range(n_lanes)]
    for i in largest_first:
        load, tie, lane = lanes[0]
        dealt[lane].append(units[i])
        heapq.heapreplace(lanes, (load + units[i].size, tie, lane))
    return dealt


def shuffle_key(*parts: object) -> bytes:
    """A sort key that orders things at random, the same in every process and Python version."""
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
