"""The `data:` settings: sources, their weights, and how documents become token batches. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from fbitrain.base.home import PATH

KINDS = ("text", "token_ids")


@dataclass(frozen=True)
class SourceConfig:
    """One subset of the corpus, e.g. RedPajama's `arxiv`."""

    name: str = ""
    paths: list[str] = field(default_factory=list)  # files, folders, globs or URLs (https, s3, hf) of .jsonl, .parquet
    weight: float = 1.0  # share of the token stream, relative to the other sources' weights
    # Files or URLs with one shard's URL per line, e.g. urls.txt.
    url_lists: list[str] = field(default_factory=list, metadata=PATH)
    include: list[str] = field(default_factory=list)  # of the listed URLs only these, e.g. "*/arxiv/*"; empty: all
    skip: list[str] = field(default_factory=list)  # shards to leave out, by name or pattern, e.g. "train_07?.jsonl"
    # Files or URLs in sha256sum's format, checked after a download.
    checksums: list[str] = field(default_factory=list, metadata=PATH)
    kind: str = "text"  # or "token_ids": records are ready-made sequences of ids, as Amber's
    text_key: str = "text"  # the record's field (parquet: column) that holds the document
    ids_key: str = "token_ids"  # the record's field that holds the ids


@dataclass(frozen=True)
class PhaseConfig:
    """Weights that hold from one step on, until the next phase."""

    from_step: int = 0  # optimizer steps done when the phase begins
    weights: dict[str, float] = field(default_factory=dict)  # source name -> weight; 0 rests it, unnamed keep theirs


@dataclass(frozen=True)
class DataConfig:
    """The training stream (docs/design.md, The stream) and the held-out documents."""

    sources: list[SourceConfig] = field(default_factory=list)
    phases: list[PhaseConfig] = field(default_factory=list)  # a curriculum; empty: the sources' weights throughout
    # Folder of `fbitrain data pretokenize`: its tokens instead of the sources' text.
    pretokenized: str = field(default="", metadata=PATH)
    skip_steps: list[int] = field(default_factory=list)  # steps, from 1, whose batches are drawn and not trained on
    heldout: list[str] = field(default_factory=list)  # shards never trained on; perplexity is measured here
    heldout_fraction: float = 0.0  # of documents, by a hash of their text, that the stream leaves out (data.holdout)
    # File of `fbitrain data duplicates`: the documents it lists are left out.
    duplicates: str = field(default="", metadata=PATH)
    # "teacher", a folder with tokenizer.json, a tokenizer.json, a SentencePiece .model, or a .gguf.
    tokenizer: str = field(default="teacher", metadata=PATH)
    seq_len: int = 2048  # tokens the model sees per sequence; a packed sequence holds seq_len + 1
    seed: int = 0  # orders shards and documents; the same seed gives the same stream
    shuffle_block: int = 1000  # documents shuffled among each other (2 MiB of them at most); 1: as they lie
    n_lanes: int = 16  # independent sub-streams dealt over ranks; world_size may change between 1 and this
    n_workers: int = 1  # tokenizer processes per rank; 0 tokenizes in the training process
    # Where remote shards are kept; may be shared by all processes of a node.
    cache_dir: str = field(default=".cache/shards", metadata=PATH)
    cache_gb: float = 100.0  # the most that the cache may hold; the shards least recently used make room
    add_bos: bool = True  # BOS before each document
    add_eos: bool = True  # EOS after each document
    # Per run: corrupt lines and truncated shards up to this many are counted, reported and skipped.
    max_bad_records: int = 1000

    @property
    def cache_bytes(self) -> int:
        return int(self.cache_gb * 1e9)


def data_problems(data: DataConfig) -> Iterator[str]:
    """Yields one sentence per impossible setting in `data` (files are looked at later, by data.shards)."""
    if not data.sources:
        yield "data.sources is empty; name at least one source with its paths"
    names = [source.name for source in data.sources]
    for i, source in enumerate(data.sources):
        where = f"data.sources[{i}]"
        if not source.name:
            yield f"{where}.name is empty; every source needs a name"
        elif names.index(source.name) != i:
            yield f"{where}.name={source.name!r} is used twice; every source needs its own name"
        if not (source.paths or source.url_lists or data.pretokenized):
            yield f"{where}.paths is empty; list the shards of source {source.name!r}, or give its url_lists"
        if not source.weight > 0:
            yield f"{where}.weight={source.weight} must be positive"
        if source.kind not in KINDS:
            yield f"{where}.kind={source.kind!r} must be {' or '.join(KINDS)}"
    yield from _phase_problems(data, names)
    for step in data.skip_steps:
        if step < 1:
            yield f"data.skip_steps names step {step}; steps count from 1"
    if not 0 <= data.heldout_fraction < 1:
        yield f"data.heldout_fraction={data.heldout_fraction} must be at least 0 and less than 1"
    if not data.cache_gb > 0:
        yield f"data.cache_gb={data.cache_gb} must be positive"
    least_values = {"seq_len": 1, "n_lanes": 1, "shuffle_block": 1, "n_workers": 0, "max_bad_records": 0}
    for name, least in least_values.items():
        if getattr(data, name) < least:
            yield f"data.{name}={getattr(data, name)} must be at least {least}"
    if not (data.add_bos or data.add_eos):
        yield "data.add_bos and data.add_eos are both false; documents would run into each other, set one of them"


def _phase_problems(data: DataConfig, names: list[str]) -> Iterator[str]:
    before = -1
    for i, phase in enumerate(data.phases):
        where = f"data.phases[{i}]"
        if phase.from_step <= before:
            yield f"{where}.from_step={phase.from_step} must be more than {before}, where the phase before it begins"
        before = phase.from_step
        for name, weight in phase.weights.items():
            if name not in names:
                yield f"{where}.weights names {name!r}, which is no source; the sources are {', '.join(names)}"
            if not 0 <= weight < math.inf:
                yield f"{where}.weights.{name}={weight} must be a number and not negative"
        if all(phase.weights.get(source.name, source.weight) == 0 for source in data.sources):
            yield f"{where}.weights are all 0; give at least one source a positive weight"
