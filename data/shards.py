"""Which files a source is made of: patterns to a sorted list of shards, and what must not change while a run lasts."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_SUFFIXES = (".txt", ".raw")


class DataError(Exception):
    """Something about the data that the user can mend. Its message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Shard:
    """One file of a source."""

    path: str  # absolute
    name: str  # relative to the source's common folder: stays the same when the corpus moves
    size: int  # bytes on disk


def find_shards(patterns: Sequence[str], source: str, suffixes: tuple[str, ...] = JSONL_SUFFIXES) -> list[Shard]:
    """The files that `patterns` (files, folders, globs) stand for, each once, sorted by name.

    A folder stands for every file below it that has one of `suffixes` and is not hidden. `source` is named in errors.
    Raises DataError for a pattern that yields no file.
    """
    paths: set[str] = set()
    for pattern in patterns:
        found = set(_expand(pattern, source, suffixes))
        if not found:
            raise DataError(
                f"{pattern!r} of source {source!r} matches no {', '.join(suffixes)} file; "
                "correct data.sources or data.heldout, or fetch the shards"
            )
        paths |= found
    if not paths:
        raise DataError(f"source {source!r} lists no paths; name its shards")
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    shards = [Shard(path, Path(path).relative_to(folder).as_posix(), os.path.getsize(path)) for path in paths]
    return sorted(shards, key=lambda shard: shard.name)


def _expand(pattern: str, source: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    path = os.path.abspath(os.path.expanduser(pattern))
    if os.path.isfile(path):
        if not path.endswith(suffixes):
            raise DataError(
                f"{pattern!r} of source {source!r} is not a shard; its name must end in {', '.join(suffixes)}"
            )
        yield path
    elif os.path.isdir(path):
        yield from _below(path, suffixes)
    else:
        for match in glob.glob(path, recursive=True):
            if os.path.isdir(match):
                yield from _below(match, suffixes)
            elif match.endswith(suffixes):
                yield match


def _below(folder: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (os.path.join(parent, name) for name in names if name.endswith(suffixes) and name[0] != ".")


def fingerprint(shards: Sequence[Shard]) -> dict[str, int]:
    """What a checkpoint remembers of a source: file names and their sizes in bytes."""
    return {shard.name: shard.size for shard in shards}


def require_same_shards(source: str, saved: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Raises DataError naming the first shard that vanished, appeared or changed size between two fingerprints."""
    if saved == now:
        return
    vanished = sorted(saved.keys() - now.keys())
    appeared = sorted(now.keys() - saved.keys())
    changed = sorted(name for name in saved.keys() & now.keys() if saved[name] != now[name])
    if vanished:
        what = f"{vanished[0]} has vanished"
    elif appeared:
        what = f"{appeared[0]} has appeared"
    else:
        what = f"{changed[0]} had {saved[changed[0]]} bytes and has {now[changed[0]]}"
    others = len(vanished) + len(appeared) + len(changed) - 1
    raise DataError(
        f"the shards of source {source!r} are not those of the checkpoint: {what}"
        + (f" (and {others} more differ)" if others else "")
        + "; restore them, or start a new run"
    )
