"""What a run's data needs, looked up before it starts: shards, lists, the cache. No shard is downloaded."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fbitrain.base.errors import UserError
from fbitrain.calibration.text import calibration_ids, needs_text
from fbitrain.config import Config
from fbitrain.data.config import SourceConfig
from fbitrain.data.duplicate_list import DuplicateList
from fbitrain.data.pretokenized.token_shards import TokenIndex
from fbitrain.data.reading.documents import BadRecord
from fbitrain.data.sources.shards import Shard, find_files
from fbitrain.data.streaming.plan import find_sources, record_format
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.data.tools.corpus import read_documents

GB = 1e9
LOOKED_AT = 20  # records of a source's first shard: one of them should hold a document


def look_at_data(
    config: Config, tokenizer: Tokenizer | None, *, world_size: int, ranks_here: int
) -> tuple[list[str], list[str]]:
    """Lines that describe the sources, and the reasons why they cannot be trained on, one sentence each."""
    lines: list[str] = []
    problems: list[str] = []
    found: dict[str, list[Shard]] = {}
    for source in config.data.sources:
        try:
            shards = find_sources(replace(config.data, sources=[source], heldout=[]))[source.name]
            lines.append(_describe(source, shards))
            found[source.name] = shards
            problems += _unreadable(config, source, shards)
        except UserError as error:
            if str(error) not in problems:  # a folder of tokens that is missing is missing for every source
                problems.append(str(error))
    for check in (_heldout, _duplicates, _tokens, _calibration):
        try:
            check(config, found, tokenizer)
        except UserError as error:
            problems.append(str(error))
    remote = [shard for shards in found.values() for shard in shards if "://" in shard.path]
    if remote and not config.data.pretokenized:
        lines.append(_describe_cache(config, found, world_size, ranks_here))
        problems += _cache_problems(config, found, world_size, ranks_here)
    return lines, problems


def _describe(source: SourceConfig, shards: Sequence[Shard]) -> str:
    sizes = [shard.size for shard in shards if shard.size >= 0]
    size = f"{sum(sizes) / 1e6:,.1f} MB" if sizes else "size not known yet"
    return f"{source.name}: {len(shards)} shards, {size}, weight {source.weight:g}"


def _unreadable(config: Config, source: SourceConfig, shards: Sequence[Shard]) -> Iterator[str]:
    """A wrong text_key, said now and not after the first thousand bad records. Looks into one local shard."""
    local = [shard for shard in shards if "://" not in shard.path and shard.size]
    if config.data.pretokenized or not local:
        return
    format = record_format(source)
    items = list(itertools.islice(read_documents(local[0].path, format, local[0].path), LOOKED_AT))
    if items and all(isinstance(item, BadRecord) for item in items):
        yield f"source {source.name!r}: the first {len(items)} records hold no document, the last is {items[-1]}"


def _heldout(config: Config, found: Mapping[str, Sequence[Shard]], tokenizer: Tokenizer | None) -> None:
    data = config.data
    if data.heldout:
        find_files(data.heldout, "heldout")
        find_sources(replace(data, sources=[source for source in data.sources if source.name in found]))


def _duplicates(config: Config, found: Mapping[str, Sequence[Shard]], tokenizer: Tokenizer | None) -> None:
    if config.data.duplicates and len(found) == len(config.data.sources):
        DuplicateList(config.data.duplicates).require_shards(found)


def _tokens(config: Config, found: Mapping[str, Sequence[Shard]], tokenizer: Tokenizer | None) -> None:
    if config.data.pretokenized and found and tokenizer:
        TokenIndex(config.data.pretokenized).require_tokenizer(tokenizer.fingerprint)


def _calibration(config: Config, found: Mapping[str, Sequence[Shard]], tokenizer: Tokenizer | None) -> None:
    """Reads calibration.path, a second's work; the stream, which may lie far away, is only listed."""
    if needs_text(config) and config.calibration.path and tokenizer:
        calibration_ids(config, tokenizer)
    elif needs_text(config) and config.calibration.sources:
        find_sources(replace(config.data, sources=config.calibration.sources, heldout=[], pretokenized=""))


def _open_at_once(config: Config, found: Mapping[str, Sequence[Shard]], world_size: int, ranks_here: int) -> list[int]:
    """Per source how many shards the lanes of this node have open together."""
    lanes = math.ceil(config.data.n_lanes / world_size) * ranks_here
    return [min(lanes, len(shards)) for shards in found.values()]


def _describe_cache(config: Config, found: Mapping[str, Sequence[Shard]], world_size: int, ranks_here: int) -> str:
    n_open = sum(_open_at_once(config, found, world_size, ranks_here))
    return f"cache: {config.data.cache_gb:g} GB in {config.data.cache_dir}, for up to {n_open} shards open at once here"


def _cache_problems(
    config: Config, found: Mapping[str, Sequence[Shard]], world_size: int, ranks_here: int
) -> Iterator[str]:
    folder = Path(config.data.cache_dir).absolute()
    held = sum(path.stat().st_size for path in folder.glob("*") if path.is_file()) if folder.is_dir() else 0
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + held
    if free < config.data.cache_gb * GB:
        yield (
            f"data.cache_gb={config.data.cache_gb:g} is more than the {free / GB:.1f} GB that {folder} has free; "
            "make room, lower it, or set data.cache_dir"
        )
    needed = 0.0
    for n_open, shards in zip(_open_at_once(config, found, world_size, ranks_here), found.values(), strict=True):
        sizes = [shard.size for shard in shards if shard.size >= 0 and "://" in shard.path]
        needed += n_open * (sum(sizes) / len(sizes) if sizes else 0)
    if needed > config.data.cache_gb * GB:
        yield (
            f"the lanes of this node have shards of about {needed / GB:.1f} GB open at once, and "
            f"data.cache_gb={config.data.cache_gb:g}; raise it, use more nodes, or fewer data.n_lanes in a new run"
        )
