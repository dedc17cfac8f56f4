"""A lane: one of the run's independent token streams, and the held-out text beside them (docs/design.md, The stream).

A lane is a pure function of its plan and its state. The state is a position in the files, small and JSON: what the lane
holds of a half-used document is found again by reading and tokenizing that document once more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fbitrain.data.plan import LanePlan, SourcePlan, Unit, shuffle_key
from fbitrain.data.records import BadRecord, Position, Record, read_record, read_records
from fbitrain.data.shards import JSONL_SUFFIXES, TEXT_SUFFIXES, DataError, find_shards
from fbitrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch  # tokenizer processes import this module and must not pay for torch

logger = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "\n\n"  # of the held-out text (the GPTQ protocol)


@dataclass
class SourceState:
    """How far a lane has got in one source. Units are counted in the order of the epoch's shuffle."""

    epoch: int = 0
    unit: int = 0
    line: int = 0  # the next line to read, counted from 0
    offset: int = 0  # bytes before it in the decompressed shard
    documents: int = 0
    bytes: int = 0  # UTF-8 bytes of those documents
    tokens: int = 0  # with BOS and EOS
    tokens_in_epoch: int = 0
    dropped: bool = False  # the lane has no document of this source


def initial_state(plan: LanePlan) -> dict[str, Any]:
    """The state of a lane that has read nothing."""
    sources = {source.name: vars(SourceState()) for source in plan.sources}
    return {"sources": sources, "carry": None, "sequences": 0, "bad_records": 0, "empty": False}


class Lane:
    """Iterates over sequences int64 [T+1]: consecutive, disjoint pieces of the lane's one running sequence of tokens.

    Ends only when no source has a document for this lane. `state()` after a sequence restores what follows it, bit for
    bit. `take_notes()` hands over what the user should read.
    """

    def __init__(self, plan: LanePlan, tokenizer: Tokenizer, state: dict[str, Any] | None = None) -> None:
        state = initial_state(plan) if state is None else state
        self.plan, self.tokenizer = plan, tokenizer
        self._notes: list[str] = []
        self._last_bad = ""
        self.sequences: int = state["sequences"]
        self.bad_records: int = state["bad_records"]
        self.empty: bool = state["empty"]
        self.readers = [
            _SourceReader(source, self, SourceState(**state["sources"][source.name])) for source in plan.sources
        ]
        self._before, self._after = border_tokens(tokenizer, plan.add_bos, plan.add_eos)
        # The running sequence not yet handed out is always the end of one document, of which this is the place.
        self._carry: dict[str, Any] | None = state["carry"]
        self._tokens: list[int] = self._reread(self._carry) if self._carry else []
        self._start = 0  # first token of _tokens not yet handed out

    def __iter__(self) -> Iterator[npt.NDArray[np.int64]]:
        return self

    def __next__(self) -> npt.NDArray[np.int64]:
        length = self.plan.seq_len + 1
        while len(self._tokens) - self._start < length:
            if not self._append_document():
                self.empty, self._tokens, self._start = True, [], 0
                raise StopIteration
        piece = np.array(self._tokens[self._start : self._start + length], dtype=np.int64)
        self._start += length
        self.sequences += 1
        return piece

    def state(self) -> dict[str, Any]:
        """Where the lane stands, as fresh JSON-serialisable values."""
        carry = None
        if self._carry and (left := len(self._tokens) - self._start):
            carry = {**self._carry, "left": left}
        return {
            "sources": {reader.plan.name: dict(vars(reader.state)) for reader in self.readers},
            "carry": carry,
            "sequences": self.sequences,
            "bad_records": self.bad_records,
            "empty": self.empty,
        }

    def take_notes(self) -> tuple[tuple[str, ...], str]:
        """What there is to tell since the last call, and the last bad record among it (or nothing)."""
        taken = tuple(self._notes), self._last_bad
        self._notes, self._last_bad = [], ""
        return taken

    def report(self, bad: BadRecord, count: bool) -> None:
        """Notes a bad record; one more than the limit ends the run."""
        self._last_bad = str(bad)
        self._notes.append(f"skipped {bad}")
        self.bad_records += count
        if self.bad_records > self.plan.max_bad_records:
            raise DataError(too_many_bad_records(self.plan.max_bad_records, str(bad)))

    def _append_document(self) -> bool:
        """Reads the next document behind the running sequence. False where there is none in any source."""
        while readers := [reader for reader in self.readers if not reader.state.dropped]:
            reader = self._furthest_below(readers)
            record = reader.next_record()
            if record is None:
                self._notes.append(f"lane {self.plan.lane}: source {reader.plan.name!r} has no document for it")
                continue
            ids = self._wrapped(record.text)
            reader.count(record, len(ids))
            self._tokens = self._tokens[self._start :] + ids
            self._start = 0
            self._carry = {"source": reader.plan.name, "line": record.at.line, "offset": record.at.offset}
            return True
        return False

    def _furthest_below(self, readers: Sequence[_SourceReader]) -> _SourceReader:
        """The source whose tokens fall furthest short of its weight's share; of equals the heaviest."""
        total = sum(reader.state.tokens for reader in readers)
        weights = sum(reader.plan.weight for reader in readers)
        return max(
            readers,
            key=lambda reader: (reader.plan.weight / weights * total - reader.state.tokens, reader.plan.weight),
        )

    def _wrapped(self, text: str) -> list[int]:
        return [*self._before, *self.tokenizer.encode(text), *self._after]

    def _reread(self, carry: dict[str, Any]) -> list[int]:
        """The tokens of the running sequence that were left over when the state was taken."""
        reader = next(reader for reader in self.readers if reader.plan.name == carry["source"])
        ids = self._wrapped(reader.reread(Position(carry["line"], carry["offset"])).text)
        return ids[len(ids) - carry["left"] :]


class _SourceReader:
    """One lane's endless pass over its units of one source."""

    def __init__(self, plan: SourcePlan, lane: Lane, state: SourceState) -> None:
        self.plan, self.lane, self.state = plan, lane, state
        self._records: Iterator[Record | BadRecord] | None = None

    def next_record(self) -> Record | None:
        """The next document; None, and the source is dropped, after a whole epoch that gave not one token."""
        state = self.state
        while True:
            while state.unit < len(self.plan.units):
                for item in self._open():
                    if isinstance(item, Record):
                        return item
                    # Later epochs meet the same bad lines again: they are told, but each counts once.
                    self.lane.report(item, count=state.epoch == 0)
                self._records = None
                state.unit, state.line, state.offset = state.unit + 1, 0, 0
            if not state.tokens_in_epoch:
                state.dropped = True
                return None
            state.epoch, state.unit, state.tokens_in_epoch = state.epoch + 1, 0, 0

    def count(self, record: Record, n_tokens: int) -> None:
        """Moves the state past `record`, which became `n_tokens` tokens."""
        state = self.state
        state.line, state.offset = record.after.line, record.after.offset
        state.documents += 1
        state.bytes += len(record.text.encode())
        state.tokens += n_tokens
        state.tokens_in_epoch += n_tokens

    def reread(self, at: Position) -> Record:
        """The document last read, which is in the unit where the reader still stands."""
        return read_record(self._unit().shard, self.plan.text_key, at)

    def _open(self) -> Iterator[Record | BadRecord]:
        if self._records is None:
            unit, start = self._unit(), Position(self.state.line, self.state.offset)
            self._records = read_records(unit.shard, self.plan.text_key, start, unit.part, unit.n_parts)
        return self._records

    def _unit(self) -> Unit:
        lane = self.lane.plan
        order = sorted(
            range(len(self.plan.units)),
            key=lambda i: shuffle_key(lane.seed, self.plan.name, lane.lane, self.state.epoch, i),
        )
        return self.plan.units[order[self.state.unit]]


def too_many_bad_records(limit: int, last: str) -> str:
    """The message of the error that ends a run whose data is too damaged."""
    return (
        f"more than data.max_bad_records={limit} bad records, the last one in {last}; "
        "repair or remove the shards that the log names, or raise data.max_bad_records"
    )


def border_tokens(tokenizer: Tokenizer, add_bos: bool, add_eos: bool) -> tuple[list[int], list[int]]:
    """What goes before and behind every document. Raises DataError where the tokenizer has no such token."""
    for wanted, token_id, kind, switch in (
        (add_bos, tokenizer.bos_id, "BOS", "data.add_bos"),
        (add_eos, tokenizer.eos_id, "EOS", "data.add_eos"),
    ):
        if wanted and token_id is None:
            raise DataError(
                f"tokenizer {tokenizer.path} names no {kind} token; set {switch}=false, or give another tokenizer"
            )
    before = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if add_eos and tokenizer.eos_id is not None else []
    return before, after


@dataclass(frozen=True)
class Heldout:
    """Text that is measured, never trained on: its documents joined by a blank line and tokenized once."""

    token_ids: torch.Tensor  # int64 [n]
    n_bytes: int  # UTF-8 bytes of the joined text
    n_documents: int


def load_heldout(paths: Sequence[str], tokenizer: Tokenizer, text_key: str = "text") -> Heldout:
    """Reads held-out shards, and .txt or .raw files of which each is one document, in the order of their names.

    Bad records are logged and left out. Raises DataError where no document is left.
    """
    import torch

    documents: list[str] = []
    for shard in find_shards(paths, "heldout", JSONL_SUFFIXES + TEXT_SUFFIXES):
        if shard.path.endswith(TEXT_SUFFIXES):
            documents.append(_read_text(shard.path))
            continue
        for item in read_records(shard, text_key):
            if isinstance(item, Record):
                documents.append(item.text)
            else:
                logger.warning("held-out text: skipped %s", item)
    text = DOCUMENT_SEPARATOR.join(documents)
    if not text:
        raise DataError(f"the held-out shards {', '.join(paths)} hold no text; correct data.heldout")
    token_ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    return Heldout(token_ids, n_bytes=len(text.encode()), n_documents=len(documents))


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # newlines stay as they are, their bytes are counted
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error})") from None
