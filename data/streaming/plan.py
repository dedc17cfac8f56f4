"""The plan of a run: shards cut into units, units dealt to lanes. Fixed for the run, whatever the number of ranks."""

from __future__ import annotations

import hashlib
import heapq
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.pretokenized.token_shards import TokenIndex
from fbitrain.data.reading.documents import BlockLimits
from fbitrain.data.reading.records import RecordFormat
from fbitrain.data.sources.patterns import is_url
from fbitrain.data.sources.shards import Shard, find_files, find_shards
from fbitrain.data.streaming.steps import SequencesPerStep, StepSizes

# With this many units of equal size per lane, no lane gets more than about a quarter above its share of a source.
UNITS_PER_LANE = 4
BLOCKS_BYTES = 384 << 20
LEAST_BLOCK_BYTES, MOST_BLOCK_BYTES = 64 << 10, 2 << 20


@dataclass(frozen=True)
class Unit:
    """The records `part`, `part + n_parts`, … of one shard."""

    shard: Shard
    part: int
    n_parts: int
    size: float  # bytes that are this unit's share of the shard, estimated where the shard's size is not known


@dataclass(frozen=True)
class SourcePlan:
    """What one lane reads of one source."""

    name: str
    format: RecordFormat
    units: tuple[Unit, ...]
    tokenized: bool = False  # the units' shards are pretokenized


@dataclass(frozen=True)
class Phase:
    """The sources' weights, in their order, from a global sequence number on."""

    first_sequence: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class LanePlan:
    """All that one lane needs to know to produce its stream."""

    lane: int
    sources: tuple[SourcePlan, ...]
    phases: tuple[Phase, ...]
    limits: BlockLimits
    seq_len: int
    seed: int
    add_bos: bool
    add_eos: bool
    heldout_fraction: float
    max_bad_records: int
    log_documents: bool = False
    log_spans: bool = False  # say of every sequence which pieces of documents it holds


def find_sources(data: DataConfig) -> dict[str, list[Shard]]:
    """The shards of every source, by its name. Raises UserError for a missing one, and for one that is held out."""
    index = TokenIndex(data.pretokenized) if data.pretokenized else None
    held = {os.path.realpath(shard.path) for shard in find_files(data.heldout, "heldout")} if data.heldout else set()
    found = {}
    for source in data.sources:
        shards = found[source.name] = _tokenized(index, source) if index else find_shards(source)
        originals = index.originals(source.name) if index else [shard.path for shard in shards]
        if both := [path for path in originals if os.path.realpath(path) in held] if held else []:
            raise UserError(
                f"{both[0]} is both held out and part of source {source.name!r}; "
                "take it out of data.heldout or data.sources"
            )
    return found


def _tokenized(index: TokenIndex, source: SourceConfig) -> list[Shard]:
    """The source's shards as they were tokenized: the very ones that its text would be read from."""
    local = bool(source.paths) and not source.url_lists and not any(map(is_url, source.paths))
    try:
        originals = find_shards(source) if local else None
    except UserError:  # the text may be gone by now, its tokens are all that is needed
        originals = None
    index.require_source(source, originals)
    return index.shards(source.name)


def plan_lanes(
    data: DataConfig,
    sources: Mapping[str, Sequence[Shard]],
    *,
    sequences_per_step: SequencesPerStep = 0,
    log_documents: bool = False,
    log_spans: bool = False,
) -> list[LanePlan]:
    """One plan per lane. Every record of every shard is in exactly one unit, and every unit in exactly one lane."""
    dealt = {
        source.name: deal(cut(sources[source.name], data.n_lanes), data.n_lanes, f"{data.seed}/{source.name}")
        for source in data.sources
    }
    return [
        LanePlan(
            lane=lane,
            sources=tuple(
                SourcePlan(source.name, record_format(source), tuple(dealt[source.name][lane]), bool(data.pretokenized))
                for source in data.sources
            ),
            phases=plan_phases(data, sequences_per_step),
            limits=BlockLimits(data.shuffle_block, block_bytes(data)),
            seq_len=data.seq_len,
            seed=data.seed,
            add_bos=data.add_bos,
            add_eos=data.add_eos,
            heldout_fraction=data.heldout_fraction,
            max_bad_records=data.max_bad_records,
            log_documents=log_documents,
            log_spans=log_spans,
        )
        for lane in range(data.n_lanes)
    ]


def block_bytes(data: DataConfig) -> int:
    """The most that a block may hold: even if one worker had all lanes, their blocks would take BLOCKS_BYTES."""
    each = BLOCKS_BYTES // (data.n_lanes * max(1, len(data.sources)))
    return max(LEAST_BLOCK_BYTES, min(MOST_BLOCK_BYTES, each))


def plan_phases(data: DataConfig, sequences_per_step: SequencesPerStep) -> tuple[Phase, ...]:
    """The sources' own weights from the start, then data.phases, whose borders are steps."""
    assert sequences_per_step or not data.phases, "phases begin at steps: say how many sequences a step has"
    sizes = StepSizes.of(sequences_per_step)
    phases = [Phase(0, tuple(source.weight for source in data.sources))]
    for phase in data.phases:
        weights = tuple(phase.weights.get(source.name, source.weight) for source in data.sources)
        phases.append(Phase(sizes.sequences_after(phase.from_step), weights))
    return tuple(phases)


def record_format(source: SourceConfig) -> RecordFormat:
    """How the records of a source's shards are decoded."""
    return RecordFormat(source.kind, source.text_key if source.kind == "text" else source.ids_key)


def cut(shards: Sequence[Shard], n_lanes: int) -> list[Unit]:
    """Shards as units of about equal size, at least one per lane; a large shard is split by line number.

    Every part of a shard is read by going through all its lines, so shards are split no further than the dealing needs.
    """
    sizes = _sizes(shards)
    target = sum(sizes) / (n_lanes * UNITS_PER_LANE)
    units = []
    for shard, size in zip(shards, sizes, strict=True):
        n_parts = min(max(1, math.ceil(size / target)), n_lanes) if target else 1
        units += [Unit(shard, part, n_parts, size / n_parts) for part in range(n_parts)]
    return units


def _sizes(shards: Sequence[Shard]) -> list[float]:
    """Bytes per shard; an unknown size counts as the average of the others: asking would take a request per shard."""
    known = [shard.size for shard in shards if shard.size >= 0]
    average = sum(known) / len(known) if known else 1.0
    return [shard.size if shard.size >= 0 else average for shard in shards]


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
