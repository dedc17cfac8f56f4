"""Text shards as blocks, and the order in which the records of a block are handed out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fbitrain.data.reading.documents import BadRecord, Block, BlockLimits, Document, Entry, Position
from fbitrain.data.reading.records import RecordFormat, decode, read_entries
from fbitrain.data.streaming.plan import shuffle_key


class RecordBlock:
    """Consecutive entries of a unit, decoded when they are asked for."""

    def __init__(self, entries: Sequence[Entry], format: RecordFormat, display_path: str) -> None:
        self._entries, self._format, self._display_path = entries, format, display_path

    @property
    def start(self) -> Position:
        return self._entries[0].at

    @property
    def after(self) -> Position:
        return self._entries[-1].after

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, i: int) -> Document | BadRecord:
        return decode(self._entries[i], self._format, self._display_path)

    def line(self, i: int) -> int:
        return self._entries[i].at.line


class RecordUnit:
    """Lines `part, part + n_parts, …` of a shard that lies at `path` and is called `display_path` in messages."""

    def __init__(
        self,
        path: str,
        display_path: str,
        format: RecordFormat,
        part: int,
        n_parts: int,
        limits: BlockLimits,
    ) -> None:
        self._path, self._display_path, self._format = path, display_path, format
        self._part, self._n_parts, self._limits = part, n_parts, limits

    def blocks(self, start: Position) -> Iterator[Block | BadRecord]:
        entries: list[Entry] = []
        n_bytes = 0
        lost: BadRecord | None = None
        for entry in read_entries(self._path, self._format, start, self._part, self._n_parts):
            if isinstance(entry, BadRecord):
                lost = BadRecord(self._display_path, entry.line, entry.reason)
                break
            entries.append(entry)
            n_bytes += entry.size
            if len(entries) >= self._limits.max_documents or n_bytes >= self._limits.max_bytes:
                yield RecordBlock(entries, self._format, self._display_path)
                entries, n_bytes = [], 0
        if entries:
            yield RecordBlock(entries, self._format, self._display_path)
        if lost:
            yield lost


def block_order(n: int, *key: object) -> list[int]:
    """A permutation of range(n) that depends on `key` alone: on no library version, process or machine."""
    # Of numpy's randomness only a bit generator's raw stream is promised never to change (NEP 19).
    bits = np.random.PCG64(int.from_bytes(shuffle_key(*key)[:16], "little")).random_raw(n)
    order: list[int] = np.argsort(bits, kind="stable").tolist()
    return order
