"""One rank's batches: sequences drawn from its lanes in turn, each batch with the state that continues behind it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import torch

from fbitrain.data.config import DataConfig
from fbitrain.data.plan import LanePlan, find_sources, plan_lanes
from fbitrain.data.shards import DataError, fingerprint, require_same_shards
from fbitrain.data.stream import border_tokens, initial_state, too_many_bad_records
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.data.worker import Drawn, Job, WorkerProcess, produce

logger = logging.getLogger(__name__)

STATE_VERSION = 1


class TokenLoader:
    """Iterates over (batch int64 [micro_batch_size, seq_len + 1], state), without end.

    The state is a JSON-serialisable dict. The list of the states of all ranks of a saved run, given as `states`,
    continues that run: on as many ranks bit for bit, on another number with the lanes dealt anew and every document
    still read once per epoch. Sequences that workers prepared but nobody drew are not in the state. micro_batch_size,
    n_workers and the sources' weights may change between runs; a changed weight counts for the whole run's mixture, so
    the stream then catches up.

    Raises DataError for missing or changed shards, a state that does not fit, more bad records than allowed, a rank
    without documents, and a tokenizer process that died.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer_path: str,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        states: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        if data.n_lanes < world_size:
            raise DataError(f"data.n_lanes={data.n_lanes} is less than the {world_size} ranks; every rank needs a lane")
        self._data, self._rank = data, rank
        self._micro_batch_size = micro_batch_size
        tokenizer = load_tokenizer(tokenizer_path)
        border_tokens(tokenizer, data.add_bos, data.add_eos)
        sources = find_sources(data)
        self._identity = _identity(data, tokenizer) | {
            "fingerprint": {name: fingerprint(shards) for name, shards in sources.items()},
            "world_size": world_size,
        }
        plans = plan_lanes(data, sources)[rank::world_size]
        self._lane_states = {str(plan.lane): initial_state(plan) for plan in plans}
        first = rank
        if states is not None:
            _require_continuable(self._identity, states)
            saved = _merge_lanes(states, data.n_lanes)
            self._lane_states = {lane: saved[lane] for lane in self._lane_states}
            first = _next_lane(states, rank, world_size)
        self._turn = _in_turn([plan for plan in plans if not self._lane_states[str(plan.lane)]["empty"]], first)
        self._feeds = self._open_feeds(tokenizer)
        self._workers = [feed for feed in self._feeds.values() if isinstance(feed, WorkerProcess)]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, Any]]:
        sequences = [self._draw() for _ in range(self._micro_batch_size)]
        return torch.from_numpy(np.stack(sequences)), self._state()

    def stats(self) -> dict[str, Any]:
        """Counters of this rank since the run began: documents, bytes, tokens per source, bad_records.

        `epochs` are completed passes, averaged over the rank's lanes. What was read and not yet drawn is not counted.
        """
        lanes = list(self._lane_states.values())
        names = [source.name for source in self._data.sources]
        counters: dict[str, Any] = {
            key: {name: sum(lane["sources"][name][key] for lane in lanes) for name in names}
            for key in ("documents", "bytes", "tokens")
        }
        counters["epochs"] = {
            name: sum(lane["sources"][name]["epoch"] for lane in lanes) / len(lanes) for name in names
        }
        counters["bad_records"] = sum(lane["bad_records"] for lane in lanes)
        return counters

    def close(self) -> None:
        """Ends the tokenizer processes. May be called twice."""
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> TokenLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_feeds(self, tokenizer: Tokenizer) -> dict[int, Iterator[Drawn]]:
        """For each lane, where its sequences come from. A feed serves its lanes in the order in which we draw them."""
        feeds: dict[int, Iterator[Drawn]] = {}
        n_feeds = max(1, min(self._data.n_workers, len(self._turn)))
        for i in range(n_feeds):
            plans = self._turn[i::n_feeds]
            job = Job(tuple((plan, self._lane_states[str(plan.lane)]) for plan in plans), tokenizer.path)
            feed = WorkerProcess(job) if self._data.n_workers else produce(job, tokenizer)
            feeds |= {plan.lane: feed for plan in plans}
        return feeds

    def _draw(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        while self._turn:
            plan = self._turn.pop(0)
            drawn = next(self._feeds[plan.lane])
            assert drawn.lane == plan.lane or drawn.error, "a feed lost its order"
            self._lane_states[str(drawn.lane)] = drawn.state
            self._report(drawn)
            if drawn.tokens is not None:
                self._turn.append(plan)
                return drawn.tokens
        raise DataError(
            f"rank {self._rank} has no documents left: the sources hold none, or too few for data.n_lanes="
            f"{self._data.n_lanes} lanes; give more data, or fewer lanes (not fewer than ranks)"
        )

    def _report(self, drawn: Drawn) -> None:
        for note in drawn.notes:
            logger.warning("rank %d: %s", self._rank, note)
        if drawn.error:
            raise DataError(drawn.error)
        bad_records = sum(lane["bad_records"] for lane in self._lane_states.values())
        if drawn.last_bad and bad_records > self._data.max_bad_records:
            raise DataError(too_many_bad_records(self._data.max_bad_records, drawn.last_bad))

    def _state(self) -> dict[str, Any]:
        return {
            **self._identity,
            "next_lane": self._turn[0].lane,
            "lanes": dict(self._lane_states),
            "stats": self.stats(),
        }


def _identity(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run may not change without its positions losing their meaning."""
    return {
        "version": STATE_VERSION,
        "n_lanes": data.n_lanes,
        "seed": data.seed,
        "seq_len": data.seq_len,
        "add_bos": data.add_bos,
        "add_eos": data.add_eos,
        "tokenizer": tokenizer.fingerprint,
    }


def _require_continuable(identity: Mapping[str, Any], states: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError naming the first thing in which `states` are not of this configuration."""
    for state in states:
        for key in ("version", "n_lanes", "seed", "seq_len", "add_bos", "add_eos", "tokenizer"):
            if state.get(key) != identity[key]:
                raise DataError(
                    f"the checkpoint's data state has {key}={state.get(key)}, this run has {key}={identity[key]}; "
                    "resume with the same settings, or start a new run"
                )
        saved, now = state["fingerprint"], identity["fingerprint"]
        if saved.keys() != now.keys():
            raise DataError(
                f"the checkpoint's sources are {', '.join(sorted(saved))}, this run's are {', '.join(sorted(now))}; "
                "resume with the same sources, or start a new run"
            )
        for name, shards in now.items():
            require_same_shards(name, saved[name], shards)


def _merge_lanes(states: Sequence[Mapping[str, Any]], n_lanes: int) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for state in states:
        merged |= state["lanes"]
    missing = [lane for lane in range(n_lanes) if str(lane) not in merged]
    if missing or len(states) != states[0]["world_size"] or sum(len(state["lanes"]) for state in states) != n_lanes:
        raise DataError(
            f"{len(states)} data states were given of a run on {states[0]['world_size']} ranks, and they miss lanes "
            f"{missing}; give the state of every rank, each once"
        )
    return merged


def _next_lane(states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> int:
    """Where this rank left off, if the run goes on with as many ranks; else its first lane."""
    if states[0]["world_size"] == world_size:
        for state in states:
            if state["next_lane"] % world_size == rank:
                return int(state["next_lane"])
    return rank


def _in_turn(plans: Sequence[LanePlan], first: int) -> list[LanePlan]:
    """The lanes in the order of drawing: from lane `first` on, then around."""
    return sorted(plans, key=lambda plan: (plan.lane < first, plan.lane))
