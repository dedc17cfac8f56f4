"""One rank's batches: sequences drawn from its lanes in turn, each batch with the state that continues behind it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig
from fbitrain.data.duplicate_list import DuplicateList
from fbitrain.data.pretokenized.token_shards import TokenIndex
from fbitrain.data.reading.documents import Span
from fbitrain.data.sources.fingerprint import ShardList, fingerprint, shard_list
from fbitrain.data.streaming.continuing import (
    continued,
    identity,
    in_turn,
    next_of_all,
    next_of_rank,
    require_continuable,
)
from fbitrain.data.streaming.plan import LanePlan, find_sources, plan_lanes
from fbitrain.data.streaming.source_reader import SourceState
from fbitrain.data.streaming.steps import SequencesPerStep, StepSizes, dealt
from fbitrain.data.streaming.stream import border_tokens, initial_state, too_many_bad_records
from fbitrain.data.streaming.worker import Drawn, Feed, Job, LaneFeed, WorkerProcess
from fbitrain.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

COUNTED = ("documents", "bytes", "tokens", "heldout", "duplicates", "replaced")


class TokenLoader:
    """Iterates over batches int64 [micro_batch_size, seq_len + 1], without end; `state()` is the place behind the last.

    The run has one order of sequences, lane by lane in turn, and `begin_step` deals the next ones to the ranks: a step
    holds the same sequences on any number of ranks. Without `begin_step` each batch takes the next of this rank's
    lanes, which is as good on one rank.

    The state is a JSON-serialisable dict. The list of the states of all ranks of a saved run, given as `states`,
    continues that run: on as many ranks bit for bit, on another number with the lanes dealt anew and every document
    still read once per epoch. Sequences that workers prepared but nobody drew are not in the state. micro_batch_size,
    n_workers, the mixture's weights and text or pretokenized shards may change between runs; new weights concern what
    comes after. `saved_shards` is the saved run's shard_list(), by which a changed shard is named.

    `sequences_per_step`, over all ranks, is needed where data.phases says at which steps the mixture changes; of a
    batch that grows, it is every size with the steps that are done when it begins.

    Raises UserError for missing or changed shards, a state that does not fit, more bad records than allowed, a rank
    without documents, and a tokenizer process that died.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: Tokenizer,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        *,
        states: Sequence[Mapping[str, Any]] | None = None,
        saved_shards: ShardList | None = None,
        sequences_per_step: SequencesPerStep = 0,
        log_documents: bool = False,
        log_spans: bool = False,
    ) -> None:
        if data.n_lanes < world_size:
            raise UserError(f"data.n_lanes={data.n_lanes} is less than the {world_size} ranks; every rank needs a lane")
        self._data, self._rank, self._world_size = data, rank, world_size
        self._micro_batch_size = micro_batch_size
        border_tokens(tokenizer, data.add_bos, data.add_eos)
        if data.pretokenized:
            TokenIndex(data.pretokenized).require_tokenizer(tokenizer.fingerprint)
        sources = find_sources(data)
        self._shards = shard_list(sources)
        duplicates = DuplicateList(data.duplicates) if data.duplicates else None
        if duplicates:
            duplicates.require_shards(sources)
        self._identity = identity(data, tokenizer) | {
            "duplicates": duplicates.digest if duplicates else "",
            "fingerprint": {name: fingerprint(shards) for name, shards in sources.items()},
        }
        plans = plan_lanes(
            data, sources, sequences_per_step=sequences_per_step, log_documents=log_documents, log_spans=log_spans
        )
        mine = plans[rank::world_size]
        self._mixture = {
            "sequences_per_step": StepSizes.of(sequences_per_step).to_json(),
            "phases": [list(p.weights) for p in mine[0].phases],
        }
        self._drawn = 0  # sequences that all ranks together have drawn
        self._next_of_all = 0  # the lane of the sequence after those
        self._left: int | None = None  # sequences that this rank has yet to draw in the step that is going on
        saved = {plan.lane: initial_state(plan) for plan in mine}
        first = rank
        if states is not None:
            require_continuable(self._identity, states, sources, saved_shards)
            first, self._next_of_all = next_of_rank(states, rank, world_size), next_of_all(states)
            saved, self._drawn = continued(states, in_turn(mine, first), world_size, self._mixture)
        self._empty = {lane: state for lane, state in saved.items() if state["empty"]}
        self._feeds = self._open_feeds(in_turn(mine, first), saved, tokenizer)
        # A lane that was found empty is not drawn again; its feed knows.
        self._turn = [plan.lane for plan in in_turn(mine, first) if not saved[plan.lane]["empty"]]
        self._documents: list[str] = []
        self._spans: list[tuple[Span, ...]] = []
        # A rank answers for its lanes' share, so that the limit is the same on any number of ranks.
        self._bad_records_allowed = math.ceil(data.max_bad_records * len(mine) / data.n_lanes)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        self._spans = []
        n = self._micro_batch_size
        if self._left is None:
            self._count(n * self._world_size)
        else:
            n = min(n, self._left)
            self._left -= n
        batch = np.empty((n, self._data.seq_len + 1), dtype=np.int64)
        for row in batch:
            row[:] = self._draw()
        return torch.from_numpy(batch)

    def begin_step(self, n_sequences: int) -> int:
        """Begins a step of `n_sequences` over all ranks; returns its micro-batches, the same number on every rank.

        They come from `next`. A rank draws the sequences of its own lanes, so the ranks' numbers of them may differ:
        its last batches hold fewer sequences than micro_batch_size, or none. `state()` is meant for after the last.
        """
        shares = dealt(self._next_of_all, n_sequences, self._data.n_lanes, self._world_size)
        self._left = shares[self._rank]
        self._count(n_sequences)
        return math.ceil(max(shares) / self._micro_batch_size)

    def _count(self, n_sequences: int) -> None:
        self._drawn += n_sequences
        self._next_of_all = (self._next_of_all + n_sequences) % self._data.n_lanes

    def state(self) -> dict[str, Any]:
        """What continues the stream behind the last batch: JSON-serialisable, a few kilobytes per lane at most."""
        return {
            **self._identity,
            "world_size": self._world_size,
            "mixture": self._mixture,
            "drawn": self._drawn,
            "next_lane": self._turn[0],
            "next_of_all": self._next_of_all,
            "lanes": {str(lane): state for lane, state in sorted(self._lane_states().items())},
        }

    def shard_list(self) -> ShardList:
        """The shards of this run, to be kept beside the states."""
        return self._shards

    def stats(self) -> dict[str, Any]:
        """Counters of this rank: per source documents, bytes, tokens, what was left out and why, and epochs.

        They count since the run began; `epochs` are completed passes, averaged over the rank's lanes. The cache's
        counters are of this process and its workers. What was read and not yet drawn is not counted.
        """
        lanes = list(self._lane_states().values())
        stats: dict[str, Any] = {key: {} for key in (*COUNTED, "epochs")}
        for source in self._data.sources:
            states = [SourceState.from_list(lane["sources"][source.name]) for lane in lanes]
            for key in COUNTED:
                stats[key][source.name] = sum(getattr(state, key) for state in states)
            stats["epochs"][source.name] = sum(state.epoch for state in states) / len(states)
        stats["bad_records"] = self._bad_records()
        stats["cache"] = dict(sum((Counter(feed.counters()) for feed in set(self._feeds.values())), Counter()))
        return stats

    def take_documents(self) -> list[str]:
        """With log_documents, `source/shard:line` of each document begun in the batches since the last call."""
        taken, self._documents = self._documents, []
        return taken

    def spans(self) -> list[tuple[Span, ...]]:
        """With log_spans, of each sequence of the last batch the pieces of documents that it is made of."""
        return self._spans

    def close(self) -> None:
        """Ends the tokenizer processes. May be called twice."""
        for feed in set(self._feeds.values()):
            feed.close()

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_feeds(
        self, plans: Sequence[LanePlan], states: Mapping[int, dict[str, Any]], tokenizer: Tokenizer
    ) -> dict[int, Feed]:
        """For each lane, where its sequences come from. A feed serves its lanes in the order in which we draw them."""
        data = self._data
        feeds: dict[int, Feed] = {}
        alive = [plan for plan in plans if not states[plan.lane]["empty"]]
        # Ready-made tokens need no process: sending them through a pipe would cost more than reading them.
        n_workers = 0 if data.pretokenized else data.n_workers
        n_feeds = max(1, min(n_workers, len(alive)))
        for i in range(n_feeds):
            served = alive[i::n_feeds]
            job = Job(
                lanes=tuple((plan, states[plan.lane]) for plan in served),
                tokenizer_path=tokenizer.path,
                cache_dir=data.cache_dir,
                cache_bytes=data.cache_bytes,
                duplicates=data.duplicates,
                stride=data.n_lanes,
            )
            feed = WorkerProcess(job) if n_workers else LaneFeed(job, tokenizer)
            feeds |= {plan.lane: feed for plan in served}
        return feeds

    def _draw(self) -> npt.NDArray[np.int32]:
        while self._turn:
            lane = self._turn.pop(0)
            drawn = self._feeds[lane].draw()
            assert drawn.lane == lane or drawn.error, "a feed lost its order"
            self._report(drawn)
            if drawn.tokens is not None:
                self._turn.append(lane)
                return drawn.tokens
            if self._data.phases:
                raise UserError(
                    f"lane {lane} has no documents, and data.phases need some in every lane; give more data, or fewer "
                    "data.n_lanes"
                )
        raise UserError(
            f"rank {self._rank} has no documents left: the sources hold none, or too few for data.n_lanes="
            f"{self._data.n_lanes} lanes; give more data, or fewer lanes (not fewer than ranks)"
        )

    def _report(self, drawn: Drawn) -> None:
        for note in drawn.notes:
            logger.warning("rank %d: %s", self._rank, note)
        if drawn.error:
            raise UserError(drawn.error)
        self._documents += drawn.documents
        if drawn.tokens is not None:
            self._spans.append(drawn.spans)
        if drawn.last_bad and self._bad_records() > self._bad_records_allowed:
            raise UserError(too_many_bad_records(self._data.max_bad_records, drawn.last_bad))

    def _lane_states(self) -> dict[int, dict[str, Any]]:
        return self._empty | {lane: feed.state(lane) for lane, feed in self._feeds.items()}

    def _bad_records(self) -> int:
        return sum(state["bad_records"] for state in self._lane_states().values())
