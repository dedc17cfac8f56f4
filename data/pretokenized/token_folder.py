"""A folder that pretokenization writes: its lock and settings, which of its shards are finished, and its index."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import orjson

from fbitrain.base.errors import UserError
from fbitrain.base.files import claimed_folder, naming_unwritable, replacing
from fbitrain.data.pretokenized.token_shards import (
    INDEX,
    VERSION,
    ShardReport,
    TokenIndex,
    read_report,
    source_folder,
    with_ending,
)
from fbitrain.data.reading.records import RecordFormat
from fbitrain.data.sources.shards import Shard

SETTINGS = "settings.json"
LEFTOVER = re.compile(r"\..*\.tmp")  # of a process that was killed
PART = re.compile(r".*\.part\d+of\d+\.(tokens|records|json)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A shard, and the beginning of the names of the files that it becomes."""

    source: str
    format: RecordFormat
    shard: Shard
    path: Path

    def part(self, part: int, n_parts: int) -> Path:
        """The beginning of the names of a part's files, which are the shard's own where it is not divided."""
        return self.path if n_parts == 1 else with_ending(self.path, f".part{part}of{n_parts}")

    def change_since(self, report: ShardReport) -> str:
        """How the shard is other than when `report` was written, or nothing."""
        # A URL has no size until somebody asks for it: the same corpus may have been listed with and without sizes.
        if report.size != self.shard.size and min(report.size, self.shard.size) >= 0:
            return f"has changed: it had {report.size} bytes and has {self.shard.size},"
        if (report.kind, report.key) != (self.format.kind, self.format.key):
            return f"is read otherwise: as {report.kind} from field {report.key!r} before,"
        return ""


class TokenFolder:
    """The folder `path`, made by one tokenizer with ids of one dtype."""

    def __init__(self, path: Path, tokenizer_fingerprint: str, dtype: str) -> None:
        self.path = path
        self._settings = {"version": VERSION, "tokenizer": tokenizer_fingerprint, "dtype": dtype}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Makes or takes over the folder, for this process alone.

        Raises UserError where it cannot be written, is in use, holds something else, or another tokenizer's shards.
        """
        with naming_unwritable(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            with claimed_folder(self.path):
                self._require_ours()
                self._remove(LEFTOVER)
                yield

    def target(self, source: str, format: RecordFormat, shard: Shard) -> Target:
        """What becomes of `shard`. Raises UserError where its name leads out of this folder."""
        if any(part in ("", ".", "..") for part in shard.name.split("/")):
            raise UserError(
                f"{shard.path} of source {source!r} would be written to {shard.name!r}, which may lie outside of "
                f"{self.path}; give the source paths below one folder"
            )
        return Target(source, format, shard, source_folder(self.path, source) / shard.name)

    def require_same_origin(self, targets: Sequence[Target]) -> None:
        """Raises UserError where what is finished was made of other shards, or of another field of them.

        A shard that could not be read to its end is tokenized anew in any case, and may have been repaired.
        """
        names = {(target.source, target.shard.name) for target in targets}
        for source in {target.source for target in targets} & self._indexed.keys():
            for indexed in self._indexed[source]:
                if (source, indexed.name) not in names:
                    raise UserError(
                        f"{indexed.name} of source {source!r} was tokenized in {self.path} and is not among its shards "
                        "any more; restore it, or give another --out"
                    )
        for target in targets:
            report = read_report(target.path)
            if report and not report.lost and (change := target.change_since(report)):
                raise UserError(
                    f"{target.shard.path} {change} since it was tokenized in {self.path}; restore it, or remove "
                    f"{target.path}.json to tokenize it anew"
                )

    def finish(self, targets: Sequence[Target]) -> dict[str, list[ShardReport]]:
        """Writes the index over the finished `targets` and what other sources it had, and returns their reports."""
        found: dict[str, list[ShardReport]] = {target.source: [] for target in targets}
        for target in targets:
            finished = read_report(target.path)
            assert finished, f"{target.path} is not finished"
            found[target.source].append(finished)
        sources = {
            name: [report.summary() for report in reports] for name, reports in {**self._indexed, **found}.items()
        }
        self._write(INDEX, {**self._settings, "sources": sources})
        self._remove(PART)
        return found

    @cached_property
    def _indexed(self) -> Mapping[str, Sequence[ShardReport]]:
        """The sources of the index that was there before; none of one that cannot be read: the reports tell as much."""
        try:
            return TokenIndex(self.path).sources if (self.path / INDEX).exists() else {}
        except UserError:
            logger.warning("%s cannot be read; made anew of the shards of this configuration", self.path / INDEX)
            return {}

    def _require_ours(self) -> None:
        try:
            found = orjson.loads((self.path / SETTINGS).read_bytes())
        except (OSError, ValueError):
            if any(not LEFTOVER.fullmatch(entry.name) for entry in self.path.iterdir()):
                raise UserError(f"{self.path} holds something else; give --out a new or empty folder") from None
            self._write(SETTINGS, self._settings)
            return
        if found != self._settings:
            raise UserError(
                f"{self.path} was begun with another tokenizer, or by another version; give the same tokenizer, or "
                "another --out"
            )

    def _write(self, name: str, value: Any) -> None:
        with replacing(self.path / name) as temporary:
            temporary.write_bytes(orjson.dumps(value, option=orjson.OPT_INDENT_2))

    def _remove(self, pattern: re.Pattern[str]) -> None:
        for parent, _, names in os.walk(self.path):
            for name in names:
                if pattern.fullmatch(name):
                    os.unlink(os.path.join(parent, name))
