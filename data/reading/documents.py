"""Entries, documents and blocks: a shard's records undecoded, the documents in them, and runs of records.

A block is a run of consecutive records of one unit, small enough to hold in memory. The stream shuffles inside a block,
so that a position and an index are the whole state of the shuffle. Block borders depend on the file and the limits
alone: text read as it streams and the same text tokenized beforehand give the same blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

HASH_BYTES = 8


@dataclass(frozen=True)
class Position:
    """Where a record begins: a line of a text file, a row of a table."""

    line: int = 0  # counted from 0
    offset: int = 0  # bytes before it, after decompression; 0 in formats without


START = Position()


@dataclass(frozen=True)
class Entry:
    """One record, not yet decoded."""

    at: Position
    after: Position  # where the next record begins
    size: int  # bytes it takes undecoded: what the limit of a block counts
    raw: Any  # the line's bytes, or the cell of a table; TooLong in place of either


@dataclass(frozen=True)
class Document:
    """What a record holds: a text, or token ids where someone has tokenized it already (then nothing is put around)."""

    text: str = ""
    token_ids: npt.NDArray[np.integer[Any]] | None = None
    bordered: bool = True  # BOS and EOS go around it; a ready-made training sequence has its own
    n_bytes: int = 0  # UTF-8 bytes of the text; of a ready-made sequence 0
    n_replaced: int = 0  # invalid UTF-8 sequences that became U+FFFD
    stored_hash: int | None = None  # of the text, where it is no longer here

    def flaw(self, vocab_size: int) -> str:
        """Why a ready-made sequence cannot be trained on, or nothing; of a text there is nothing to say."""
        if self.bordered or self.token_ids is None:
            return ""
        largest = int(self.token_ids.max(initial=0))
        return f"token id {largest} is not in the vocabulary" if largest >= vocab_size else ""

    @property
    def content_hash(self) -> int:
        """64 bits of the content, the same whatever file it came from."""
        if self.stored_hash is not None:
            return self.stored_hash
        return int.from_bytes(self.content_digest(HASH_BYTES), "little")

    def content_digest(self, n_bytes: int) -> bytes:
        """So many bytes of hash of the text or the ids, where they are here."""
        content = self.text.encode() if self.token_ids is None else self.token_ids.astype("<u4").tobytes()
        return hashlib.blake2b(content, digest_size=n_bytes).digest()


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of one document as it is trained on, BOS and EOS around it; and where it stands."""

    source: str
    shard: str
    line: int  # counted from 0
    start: int
    stop: int
    length: int  # tokens of the whole document


@dataclass(frozen=True)
class BadRecord:
    """A record that holds no document, or the place where the rest of a file is lost."""

    path: str
    line: int  # counted from 0
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line + 1}: {self.reason}"


@dataclass(frozen=True)
class BlockLimits:
    """A block ends with the record that reaches either limit."""

    max_documents: int
    max_bytes: int = 2 << 20  # of undecoded records; a worker holds a block for each of its lanes and sources


class Block(Protocol):
    """Consecutive records of one unit; record i is decoded when it is asked for."""

    @property
    def start(self) -> Position: ...  # of its first record
    @property
    def after(self) -> Position: ...  # where the next block begins
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Document | BadRecord: ...
    def line(self, i: int) -> int: ...  # of record i in its shard, counted from 0


class BlockSource(Protocol):
    """An open unit."""

    def blocks(self, start: Position) -> Iterator[Block | BadRecord]:
        """The blocks from `start`, which is a block's border, to the end; a BadRecord where the rest is lost."""
