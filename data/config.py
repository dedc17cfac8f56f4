"""What is read: sources, their weights, and how their documents become token batches. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SourceConfig:
    """One subset of the corpus, e.g. RedPajama's `arxiv`."""

    name: str = ""
    paths: list[str] = field(default_factory=list)  # files, folders or globs of .jsonl, .jsonl.gz, .jsonl.zst
    weight: float = 1.0  # share of the token stream, relative to the other sources' weights
    text_key: str = "text"  # the record's field that holds the document


@dataclass(frozen=True)
class DataConfig:
    """The training stream (docs/design.md, The stream) and the held-out documents."""

    sources: list[SourceConfig] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)  # shards never trained on; perplexity is measured here
    tokenizer: str = (
        "teacher"  # "teacher", a folder with tokenizer.json, a tokenizer.json, a SentencePiece .model, or a .gguf
    )
    seq_len: int = 2048  # tokens the model sees per sequence; a packed sequence holds seq_len + 1
    seed: int = 0  # orders the shards; the same seed gives the same stream
    n_lanes: int = 16  # independent sub-streams dealt over ranks; world_size may change between 1 and this
    n_workers: int = 1  # tokenizer processes per rank; 0 tokenizes in the training process
    add_bos: bool = True  # BOS before each document
    add_eos: bool = True  # EOS after each document
    max_bad_records: int = (
        1000  # per rank; corrupt lines and truncated shards up to this many are counted, reported and skipped
    )


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
        if not source.paths:
            yield f"{where}.paths is empty; list the shards of source {source.name!r}"
        if not source.weight > 0:
            yield f"{where}.weight={source.weight} must be positive"
    for name, least in (("seq_len", 1), ("n_lanes", 1), ("n_workers", 0), ("max_bad_records", 0)):
        if getattr(data, name) < least:
            yield f"data.{name}={getattr(data, name)} must be at least {least}"
    if not (data.add_bos or data.add_eos):
        yield "data.add_bos and data.add_eos are both false; documents would run into each other, set one of them"
