"""One lane's endless pass over its units of one source, shuffled inside blocks, left-out documents passed over.

The position is (epoch, unit, block's first record, index in the block): a few numbers, from which everything that the
reader holds in memory is found again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Any, Protocol

from fbitrain.base.errors import UserError
from fbitrain.data.duplicate_list import DuplicateList
from fbitrain.data.holdout_rule import is_heldout
from fbitrain.data.pretokenized.token_shards import TokenUnit
from fbitrain.data.reading.blocks import RecordUnit, block_order
from fbitrain.data.reading.documents import BadRecord, Block, BlockSource, Document, Position
from fbitrain.data.sources.cache import OpenShard, ShardCache
from fbitrain.data.streaming.plan import LanePlan, SourcePlan, Unit, shuffle_key


class Listener(Protocol):
    """Who hears what a reader comes across."""

    def report(self, bad: BadRecord, count: bool) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class SharedFiles:
    """What readers share: the cache that remote shards come from, and the list of documents to leave out."""

    cache: ShardCache
    duplicates: DuplicateList | None = None


@dataclass
class SourceState:
    """How far a lane has got in one source. Units are counted in the order of the epoch's shuffle."""

    epoch: int = 0
    unit: int = 0
    line: int = 0  # the current block's first record, counted from 0
    offset: int = 0  # bytes before it in the decompressed shard
    index: int = 0  # records of the block that were handed out, in the block's order
    size: int = -1  # bytes of the shard that is being read, as it was when it was opened; -1 between units
    documents: int = 0
    bytes: int = 0  # UTF-8 bytes of those documents
    tokens: int = 0  # with BOS and EOS
    epoch_tokens: int = 0
    phase_tokens: int = 0  # since the weights last changed
    heldout: int = 0  # documents left out by data.heldout_fraction
    duplicates: int = 0  # documents left out by data.duplicates
    replaced: int = 0  # invalid UTF-8 sequences that became U+FFFD
    dropped: int = 0  # 1: the lane has no document of this source

    def to_list(self) -> list[int]:
        """The fields in their order: a checkpoint holds one of these per lane and source."""
        return list(astuple(self))

    @classmethod
    def from_list(cls, values: list[int]) -> SourceState:
        return cls(*values)


class SourceReader:
    """Documents of one source for one lane, without end. `state` is where the reader stands after the last one.

    `last_line` and `shard_name` say where that document came from.
    """

    def __init__(
        self, plan: SourcePlan, lane: LanePlan, files: SharedFiles, listener: Listener, state: SourceState
    ) -> None:
        self.plan, self.state = plan, state
        self.last_line = 0
        self._lane, self._shared, self._listener = lane, files, listener
        self._epoch_order: tuple[int, list[int]] = (-1, [])
        self._open: OpenShard | None = None
        self._blocks: Iterator[Block | BadRecord] = iter(())
        self._block: Block | None = None
        self._order: list[int] = []
        self._left_out: frozenset[int] = frozenset()
        self._selective = bool(lane.heldout_fraction or files.duplicates)

    @property
    def shard_name(self) -> str:
        return self._unit().shard.name

    @property
    def place(self) -> tuple[str, str, int]:
        """Source, shard and line of the document handed out last."""
        return self.plan.name, self.shard_name, self.last_line

    def next_document(self) -> Document | None:
        """The next document; None, and the source is dropped, after a whole epoch that gave not one token."""
        state = self.state
        while True:
            while state.unit < len(self.plan.units):
                while block := self._current_block():
                    if document := self._rest_of(block):
                        return document
                    state.line, state.offset, state.index = block.after.line, block.after.offset, 0
                    self._block = None
                self._close_unit()
                state.unit, state.line, state.offset, state.size = state.unit + 1, 0, 0, -1
            if not state.epoch_tokens:
                state.dropped = 1
                return None
            state.epoch, state.unit, state.epoch_tokens = state.epoch + 1, 0, 0
            if state.epoch == 1:
                self._listener.note(
                    f"lane {self._lane.lane} has read all of its source {self.plan.name!r} and begins it again"
                )

    def count(self, document: Document, n_tokens: int) -> None:
        """Adds a document, which became `n_tokens` tokens, to the counters."""
        state = self.state
        state.documents += 1
        state.bytes += document.n_bytes
        state.replaced += document.n_replaced
        state.tokens += n_tokens
        state.epoch_tokens += n_tokens
        state.phase_tokens += n_tokens

    def last_document(self) -> Document:
        """Once more the document handed out last, found by the state alone. Raises UserError where there is none."""
        block = self._current_block()
        if block and 0 < self.state.index <= len(block):
            i = self._order[self.state.index - 1]
            document = block[i]
            if isinstance(document, Document):
                self.last_line = block.line(i)
                return document
        raise self.changed(f"the document in use, near line {self.state.line + 1}, is no longer there")

    def _rest_of(self, block: Block) -> Document | None:
        """The next document that the block has to give."""
        state = self.state
        while state.index < len(block):
            i = self._order[state.index]
            state.index += 1
            item = block[i]
            if isinstance(item, BadRecord):
                # Later epochs meet the same bad records again: they are told, but each counts once.
                self._listener.report(item, state.epoch == 0)
                continue
            self.last_line = block.line(i)
            if not (self._selective and self._leaves_out(item)):
                return item
        return None

    def _leaves_out(self, document: Document) -> bool:
        fraction = self._lane.heldout_fraction
        if self.last_line in self._left_out:
            self.state.duplicates += 1
            return True
        if fraction and is_heldout(document.content_hash, self._lane.seed, fraction):
            self.state.heldout += 1
            return True
        return False

    def _current_block(self) -> Block | None:
        """The block in which the state stands; None at the end of the unit."""
        if self._block is None:
            if self._open is None:
                self._open_unit()
            item = next(self._blocks, None)
            if isinstance(item, BadRecord):
                self._listener.report(item, self.state.epoch == 0)
                return None
            if item is not None:
                unit = self._unit()
                key = (self._lane.seed, self.plan.name, self.state.epoch, unit.shard.name, unit.part, item.start.line)
                self._order = block_order(len(item), *key)
            self._block = item
        return self._block

    def _open_unit(self) -> None:
        unit, state = self._unit(), self.state
        try:
            self._open = self._shared.cache.open(unit.shard)
            self._blocks = self._block_source(unit, self._open.path).blocks(Position(state.line, state.offset))
            size = os.path.getsize(self._open.path)
        except OSError as error:
            raise self._gone(error) from None
        if not self.plan.tokenized:
            # A resumed run may fetch a remote shard again, whose size nobody knew when the run was planned.
            if state.size not in (-1, size):
                raise self.changed(f"it had {state.size} bytes when it was opened and has {size}")
            state.size = size
        self._require_unchanged()
        duplicates = self._shared.duplicates
        self._left_out = frozenset(duplicates.lines(self.plan.name, unit.shard.name)) if duplicates else frozenset()
        if state.unit + 1 < len(self.plan.units):
            self._shared.cache.prefetch(self._unit(1).shard)

    def _block_source(self, unit: Unit, path: str) -> BlockSource:
        if self.plan.tokenized:
            return TokenUnit(path, unit.part, unit.n_parts, self._lane.limits)
        return RecordUnit(path, unit.shard.path, self.plan.format, unit.part, unit.n_parts, self._lane.limits)

    def _close_unit(self) -> None:
        self._require_unchanged()
        if self._open:
            self._open.close()
        self._open, self._blocks = None, iter(())

    def _require_unchanged(self) -> None:
        """A local shard must have the size that the plan was made with, before it is read and after."""
        shard = self._unit().shard
        if self._open is None or self.plan.tokenized or self._open.path != shard.path:
            return
        try:
            size = os.path.getsize(shard.path)
        except OSError as error:
            raise self._gone(error) from None
        if size != shard.size:
            raise self.changed(f"it had {shard.size} bytes and has {size}")

    def bad_record(self, reason: str) -> BadRecord:
        """The record handed out last, with what is wrong with it."""
        return BadRecord(self._unit().shard.path, self.last_line, reason)

    def changed(self, how: str) -> UserError:
        """The error that ends a run whose present shard is not what it was."""
        return UserError(
            f"{self._unit().shard.path} of source {self.plan.name!r} has changed since the run began: {how}; "
            "restore it, or start a new run"
        )

    def _gone(self, error: OSError) -> UserError:
        return UserError(
            f"{self._unit().shard.path} of source {self.plan.name!r} was there when the run began and cannot be read "
            f"now ({error.strerror or error}); restore it"
        )

    def _unit(self, ahead: int = 0) -> Unit:
        epoch, order = self._epoch_order
        if epoch != self.state.epoch:
            key: tuple[Any, ...] = (self._lane.seed, self.plan.name, self._lane.lane, self.state.epoch)
            order = sorted(range(len(self.plan.units)), key=lambda i: shuffle_key(*key, i))
            self._epoch_order = self.state.epoch, order
        return self.plan.units[order[self.state.unit + ahead]]
