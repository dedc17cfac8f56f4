"""A lane: one of the run's independent token streams (docs/design.md, The stream).

A lane is a pure function of its plan and its state. The state is a position in the files, small and JSON: what the lane
holds of a half-used document is found again by reading and tokenizing that document once more.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fbitrain.base.errors import UserError
from fbitrain.data.reading.documents import BadRecord, Document, Span
from fbitrain.data.streaming.plan import LanePlan
from fbitrain.data.streaming.source_reader import SharedFiles, SourceReader, SourceState
from fbitrain.data.tokenizer import Tokenizer, UnencodableText

NO_TOKENS = np.empty(0, dtype=np.int32)


def initial_state(plan: LanePlan) -> dict[str, Any]:
    """The state of a lane that has read nothing."""
    sources = {source.name: SourceState().to_list() for source in plan.sources}
    return {"sources": sources, "carry": None, "sequence": plan.lane, "phase": 0, "bad_records": 0, "empty": False}


class Lane:
    """Iterates over sequences int32 [T+1]: consecutive, disjoint pieces of the lane's one running sequence of tokens.

    Ends only when no source has a document for this lane. `state()` after a sequence restores what follows it, bit for
    bit. `take_notes()` hands over what the user should read. `stride` is the number of sequences that all lanes of the
    run together draw between two of this one: by it the lane knows in which phase of the mixture it is.
    """

    def __init__(
        self,
        plan: LanePlan,
        tokenizer: Tokenizer,
        files: SharedFiles,
        state: dict[str, Any] | None = None,
        stride: int = 1,
    ) -> None:
        state = initial_state(plan) if state is None else state
        self.plan, self.tokenizer, self._stride = plan, tokenizer, stride
        self._notes: list[str] = []
        self._last_bad = ""
        self._documents: list[str] = []
        self._spans: list[Span] = []
        self._sequence: int = state["sequence"]
        self._phase = min(state["phase"], len(plan.phases) - 1)  # there were more phases when the state was taken
        self.bad_records: int = state["bad_records"]
        self.empty: bool = state["empty"]
        self._readers = [
            SourceReader(source, plan, files, self, SourceState.from_list(state["sources"][source.name]))
            for source in plan.sources
        ]
        self._mixture: list[tuple[float, SourceReader]] | None = None
        self._first_sequences = [phase.first_sequence for phase in plan.phases]
        before, after = border_tokens(tokenizer, plan.add_bos, plan.add_eos)
        self._before, self._after = np.array(before, dtype=np.int32), np.array(after, dtype=np.int32)
        # The running sequence not yet handed out is always the end of one document, the last that its source gave.
        self._carrier = ""
        self._place = ("", "", 0)  # its source, shard and line
        self._tokens = NO_TOKENS
        self._start = 0  # first token of _tokens not yet handed out
        if state["carry"]:
            self._pick_up(*state["carry"])

    def __iter__(self) -> Iterator[npt.NDArray[np.int32]]:
        return self

    def __next__(self) -> npt.NDArray[np.int32]:
        piece = np.empty(self.plan.seq_len + 1, dtype=np.int32)
        filled = 0
        while filled < len(piece):
            if self._start == len(self._tokens) and not self._next_document():
                self.empty = True
                raise StopIteration
            part = self._tokens[self._start : self._start + len(piece) - filled]
            piece[filled : filled + len(part)] = part
            if self.plan.log_spans:
                stop = self._start + len(part)
                self._spans.append(Span(*self._place, self._start, stop, len(self._tokens)))
            filled += len(part)
            self._start += len(part)
        self._sequence += self._stride
        return piece

    def state(self) -> dict[str, Any]:
        """Where the lane stands, as fresh JSON-serialisable values."""
        left = len(self._tokens) - self._start
        return {
            "sources": {reader.plan.name: reader.state.to_list() for reader in self._readers},
            "carry": [self._carrier, left, len(self._tokens)] if left else None,
            "sequence": self._sequence,
            "phase": self._phase,
            "bad_records": self.bad_records,
            "empty": self.empty,
        }

    def take_notes(self) -> tuple[tuple[str, ...], str]:
        """What there is to tell since the last call, and the last bad record among it (or nothing)."""
        taken = tuple(self._notes), self._last_bad
        self._notes, self._last_bad = [], ""
        return taken

    def take_documents(self) -> tuple[str, ...]:
        """`source/shard:line` (in a second pass `…#2`) of the documents begun since the last call, if the plan asks."""
        taken = tuple(self._documents)
        self._documents = []
        return taken

    def take_spans(self) -> tuple[Span, ...]:
        """Which tokens of which documents the last sequence holds, in their order, if the plan asks."""
        taken = tuple(self._spans)
        self._spans = []
        return taken

    def report(self, bad: BadRecord, count: bool) -> None:
        """Notes a bad record; one more than the limit ends the run."""
        self._last_bad = str(bad)
        self._notes.append(f"skipped {bad}")
        self.bad_records += count
        if self.bad_records > self.plan.max_bad_records:
            raise UserError(too_many_bad_records(self.plan.max_bad_records, str(bad)))

    def note(self, text: str) -> None:
        """Keeps `text` for the user's eyes."""
        self._notes.append(text)

    def _next_document(self) -> bool:
        """Puts the next document's tokens where the last one's were. False where no source has any."""
        self._follow_phase()
        while self._mixture:
            reader = _furthest_below(self._mixture)
            document = reader.next_document()
            if document is None:
                self._notes.append(f"lane {self.plan.lane}: source {reader.plan.name!r} has no document for it")
                self._mixture = self._mixed()
                continue
            tokens, flaw = NO_TOKENS, document.flaw(self.tokenizer.vocab_size)
            try:
                tokens = tokens if flaw else self._wrapped(document)
            except UnencodableText as error:
                flaw = str(error)
            if flaw:
                self.report(reader.bad_record(flaw), reader.state.epoch == 0)
                continue
            reader.count(document, len(tokens))
            if len(tokens):
                self._tokens, self._start, self._carrier = tokens, 0, reader.plan.name
                self._place = reader.place
                if self.plan.log_documents:
                    again = f"#{reader.state.epoch + 1}" if reader.state.epoch else ""
                    self._documents.append(f"{reader.plan.name}/{reader.shard_name}:{reader.last_line}{again}")
                return True
        return False

    def _follow_phase(self) -> None:
        """Where a phase begins, the mixture starts counting anew: a weight concerns the tokens of its own phase."""
        phase = bisect.bisect_right(self._first_sequences, self._sequence) - 1
        if phase != self._phase:
            for reader in self._readers:
                reader.state.phase_tokens = 0
        if phase != self._phase or self._mixture is None:
            self._phase = phase
            self._mixture = self._mixed()

    def _mixed(self) -> list[tuple[float, SourceReader]]:
        """The sources that the phase draws from, with their shares of its tokens; none if the lane is empty."""
        alive = [not reader.state.dropped for reader in self._readers]
        weights = [weight * has for weight, has in zip(self.plan.phases[self._phase].weights, alive, strict=True)]
        if any(alive) and not any(weights):
            raise UserError(
                f"lane {self.plan.lane} has no document of the sources that phase {self._phase} of data.phases gives a "
                "weight; give them more data, or use fewer lanes"
            )
        return [
            (weight / sum(weights), reader) for weight, reader in zip(weights, self._readers, strict=True) if weight
        ]

    def _wrapped(self, document: Document) -> npt.NDArray[np.int32]:
        if document.token_ids is None:
            ids: npt.NDArray[Any] = self.tokenizer.encode_array(document.text)
        else:
            ids = document.token_ids
        before, after = (self._before, self._after) if document.bordered else (NO_TOKENS, NO_TOKENS)
        tokens = np.empty(len(before) + len(ids) + len(after), dtype=np.int32)
        tokens[: len(before)] = before
        tokens[len(before) : len(before) + len(ids)] = ids
        tokens[len(before) + len(ids) :] = after
        return tokens

    def _pick_up(self, carrier: str, left: int, of: int) -> None:
        """Finds the tokens again that were left over when the state was taken: the last `left` of a document's `of`."""
        reader = next(reader for reader in self._readers if reader.plan.name == carrier)
        self._tokens, self._carrier = self._wrapped(reader.last_document()), carrier
        self._place = reader.place
        if len(self._tokens) != of:
            raise reader.changed(f"the document in use had {of} tokens and has {len(self._tokens)}")
        self._start = len(self._tokens) - left


def _furthest_below(mixture: list[tuple[float, SourceReader]]) -> SourceReader:
    """The source whose tokens fall furthest short of its share; of equals the heaviest."""
    if len(mixture) == 1:
        return mixture[0][1]
    total = sum([reader.state.phase_tokens for _, reader in mixture])
    return max(mixture, key=lambda item: (item[0] * total - item[1].state.phase_tokens, item[0]))[1]


def too_many_bad_records(limit: int, last: str) -> str:
    """The message of the error that ends a run whose data is too damaged."""
    return (
        f"more than data.max_bad_records={limit} bad records, the last one in {last}; "
        "repair or remove the shards that the log names, or raise data.max_bad_records"
    )


def border_tokens(tokenizer: Tokenizer, add_bos: bool, add_eos: bool) -> tuple[list[int], list[int]]:
    """What goes before and behind every document. Raises UserError where the tokenizer has no such token."""
    for wanted, token_id, kind, switch in (
        (add_bos, tokenizer.bos_id, "BOS", "data.add_bos"),
        (add_eos, tokenizer.eos_id, "EOS", "data.add_eos"),
    ):
        if wanted and token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.path} names no {kind} token; set {switch}=false, or give another tokenizer"
            )
    before = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if add_eos and tokenizer.eos_id is not None else []
    return before, after
