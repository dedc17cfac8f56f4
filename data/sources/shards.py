"""Finds the shards of a source: its paths, URLs and URL lists become one sorted list. Nothing is downloaded."""

from __future__ import annotations

import fnmatch
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from fbitrain.base.errors import UserError
from fbitrain.data.config import SourceConfig
from fbitrain.data.sources.names import name_shards
from fbitrain.data.sources.patterns import Sizes, each_file_once, expand_ranges, file_part, find, has_suffix
from fbitrain.data.sources.shard_lists import read_checksums, read_url_list, sum_of
from fbitrain.data.sources.transport import require_file_system

SHARD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TEXT_SUFFIXES = (".txt", ".raw")
MAX_NAMED = 3  # of many files with the same problem

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One file of a source."""

    path: str  # absolute, or a URL
    name: str  # relative to the source's common folder (sources.names): stays the same when the corpus moves
    size: int  # bytes; -1 for a remote file whose size nobody has asked
    sha256: str = ""  # lower-case hex, where the source's checksums tell


def find_shards(source: SourceConfig) -> list[Shard]:
    """The shards of a source, each file once even if links give it several paths, sorted by name.

    Costs no request per shard: one for each folder or glob on s3:// or hf://, and for each list that is a URL.
    Raises one UserError with every problem: a path or pattern that stands for no shard, a list that cannot be read.
    """
    problems: list[str] = []
    found = _expand_all(source.paths, SHARD_SUFFIXES, problems)
    sizes = dict.fromkeys(_listed_urls(source, problems), -1) | found
    shards = _named(sizes, problems)
    shards = _without_skipped(shards, source.skip, problems)
    shards = _with_sums(shards, source, problems)
    if not shards and not problems:
        problems.append("it has no shards; give it paths or url_lists")
    if problems:
        raise UserError(f"source {source.name!r}: " + "; ".join(problems))
    return shards


def find_files(
    patterns: Sequence[str], what: str, suffixes: tuple[str, ...] = SHARD_SUFFIXES + TEXT_SUFFIXES
) -> list[Shard]:
    """The files that `patterns` stand for, as find_shards finds them. `what` they are is said in the UserError."""
    problems: list[str] = []
    shards = _named(_expand_all(patterns, suffixes, problems), problems)
    if problems:
        raise UserError(f"{what}: " + "; ".join(problems))
    return shards


def _expand_all(patterns: Sequence[str], suffixes: tuple[str, ...], problems: list[str]) -> Sizes:
    sizes: Sizes = {}
    for pattern in patterns:
        found: Sizes = {}
        missing = []
        try:
            expanded = expand_ranges(pattern)
            for path in expanded:
                matches = find(path, suffixes)
                found |= matches
                missing += [] if matches else [path]
        except UserError as error:
            problems.append(str(error))
            continue
        if missing:
            what = repr(pattern) if len(expanded) == 1 else f"{_few(missing)} of {pattern!r}"
            problems.append(f"{what} matches no {', '.join(suffixes)} file, correct it or fetch the shards")
        sizes |= found
    once = each_file_once(sizes)
    if doubles := sorted(sizes.keys() - once.keys()):
        logger.warning("%s: links to files that are read under another path, and passed over", _few(doubles))
    return once


def _listed_urls(source: SourceConfig, problems: list[str]) -> list[str]:
    """The URLs of the source's lists that one of its `include` patterns matches."""
    urls: list[str] = []
    for path in source.url_lists:
        try:
            urls += read_url_list(path)
        except UserError as error:
            problems.append(str(error))
            return []
    if source.include:
        urls = _matching(urls, source.include, "include", lambda url: (url,), problems)
    wrong = [url for url in urls if not has_suffix(url, SHARD_SUFFIXES)]
    if wrong:
        problems.append(
            f"{_few(wrong)} in url_lists is not a shard ({', '.join(SHARD_SUFFIXES)}), leave it out by include"
        )
    for url in {url.partition("://")[0]: url for url in urls}.values():
        try:
            require_file_system(url)
        except UserError as error:
            problems.append(str(error))
    return urls


def _without_skipped(shards: list[Shard], patterns: Sequence[str], problems: list[str]) -> list[Shard]:
    def names(shard: Shard) -> tuple[str, ...]:
        return shard.name, os.path.basename(shard.name), shard.path

    # A pattern with a typo would train on what was to be left out.
    skipped = set(_matching(shards, patterns, "skip", names, problems))
    if skipped and len(skipped) == len(shards):
        problems.append("skip leaves no shard")
    return [shard for shard in shards if shard not in skipped]


def _matching(
    things: Sequence[T],
    patterns: Sequence[str],
    option: str,
    names: Callable[[T], tuple[str, ...]],
    problems: list[str],
) -> list[T]:
    """The things of which a name matches a pattern; each pattern that matches nothing is a problem."""
    matching: dict[T, None] = {}
    for pattern in patterns:
        fits = re.compile(fnmatch.translate(pattern)).match
        found = [thing for thing in things if any(fits(name) for name in names(thing))]
        if not found:
            problems.append(f"{option} pattern {pattern!r} matches no shard")
        matching |= dict.fromkeys(found)
    return list(matching)


def _with_sums(shards: list[Shard], source: SourceConfig, problems: list[str]) -> list[Shard]:
    if not source.checksums:
        return shards
    try:
        sums = read_checksums(source.checksums)
    except UserError as error:
        problems.append(str(error))
        return shards
    summed = [replace(shard, sha256=sum_of(file_part(shard.path), sums)) for shard in shards]
    without = [shard.path for shard in summed if not shard.sha256]
    if shards and len(without) == len(shards):
        problems.append(f"checksums {_few(source.checksums)} names none of its shards, e.g. {shards[0].path}")
    elif without:
        # One file of sums may be for one subset of many: no error, but not what one would guess either.
        what = source.name, len(without), len(shards), _few(without)
        logger.warning("source %r: %d of %d shards have no sum in its checksums: %s", *what)
    return summed


def _named(sizes: Sizes, problems: list[str]) -> list[Shard]:
    return [Shard(path, name, sizes[path]) for name, path in name_shards(sizes, problems).items()]


def _few(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
