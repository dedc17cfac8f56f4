"""Feeds: lanes drawn in this process, or by tokenizer processes that produce sequences ahead of it.

A worker is a plain child process joined by one pipe. The pipe is the bounded queue: a full one makes the worker wait, a
closed one makes it leave, and one that ends tells the parent that the worker is gone.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import resource
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fbitrain.base.errors import UserError
from fbitrain.base.processes import how_it_ended, leave_with, start_child
from fbitrain.data.duplicate_list import DuplicateList
from fbitrain.data.reading.documents import Span
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.streaming.plan import LanePlan
from fbitrain.data.streaming.source_reader import SharedFiles
from fbitrain.data.streaming.stream import Lane
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer

# Not `-m`: the module would be __main__ there, and its classes others than the parent's.
COMMAND = "import sys; from fbitrain.data.streaming.worker import main; main(sys.argv[1:])"
PIPE_BYTES = 1 << 20  # what Linux grants everyone: 60 sequences of 2048 tokens ahead
POLL_SECONDS = 5.0


@dataclass(frozen=True)
class Drawn:
    """What came out of a lane: a sequence, or the news that there is none, or the error that ends the run."""

    lane: int
    tokens: npt.NDArray[np.int32] | None  # [T+1]; None: the lane has no documents
    notes: tuple[str, ...] = ()  # for the user's eyes
    last_bad: str = ""  # the last bad record among the notes
    error: str = ""
    documents: tuple[str, ...] = ()  # those that begin in this sequence, if the plan asks for them
    spans: tuple[Span, ...] = ()  # what it holds of which documents, if the plan asks


@dataclass(frozen=True)
class Job:
    """Lanes in the order in which they are drawn, each with the state it goes on from, and what they share."""

    lanes: tuple[tuple[LanePlan, dict[str, Any]], ...]
    tokenizer_path: str
    cache_dir: str
    cache_bytes: int
    duplicates: str
    stride: int  # see Lane


class Feed(Protocol):
    """Where the sequences of some lanes come from; they are drawn in turn."""

    def draw(self) -> Drawn: ...
    def state(self, lane: int) -> dict[str, Any]: ...  # after the last sequence drawn from it
    def counters(self) -> Mapping[str, int]: ...  # of the shard cache
    def close(self) -> None: ...


class LaneFeed:
    """The lanes themselves, in this process. From a lane without documents nothing is drawn a second time."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        _permit_open_files()
        self._states = {plan.lane: state for plan, state in job.lanes}
        self._cache = ShardCache(job.cache_dir, job.cache_bytes)
        files = SharedFiles(self._cache, DuplicateList(job.duplicates) if job.duplicates else None)
        self._pending = deque(job.lanes)  # not opened before they are drawn: opening may read much, or fail
        self._open = partial(Lane, tokenizer=tokenizer, files=files, stride=job.stride)
        self._turn: deque[Lane] = deque()
        self._lanes: dict[int, Lane] = {}

    def draw(self) -> Drawn:
        lane: Lane | None = None
        number = self._pending[0][0].lane if self._pending else self._turn[0].plan.lane
        tokens, error = None, ""
        try:
            if self._pending:
                lane = self._lanes[number] = self._next_lane()
            else:
                lane = self._turn.popleft()
            tokens = next(lane, None)
        except UserError as data_error:
            error = str(data_error)
        except OSError as os_error:
            error = f"lane {number} cannot be read ({os_error}); mend that and start again"
        if lane is None:
            return Drawn(number, None, error=error)
        if tokens is not None:
            self._turn.append(lane)
        notes, last_bad = lane.take_notes()
        return Drawn(number, tokens, notes, last_bad, error, lane.take_documents(), lane.take_spans())

    def _next_lane(self) -> Lane:
        plan, state = self._pending.popleft()
        return self._open(plan, state=state)

    def state(self, lane: int) -> dict[str, Any]:
        return self._lanes[lane].state() if lane in self._lanes else self._states[lane]

    def counters(self) -> Mapping[str, int]:
        return self._cache.counters()

    def exhausted(self) -> bool:
        """Whether no lane is left to draw from."""
        return not (self._pending or self._turn)

    def close(self) -> None:
        """Nothing to end."""


class WorkerProcess:
    """A feed of lanes that another process draws from, ahead of us."""

    def __init__(self, job: Job) -> None:
        self._states = {plan.lane: state for plan, state in job.lanes}
        self._counters: Mapping[str, int] = {}
        reader, writer = os.pipe()
        _widen(writer)
        try:
            self.process = start_child(COMMAND, [str(writer)], [writer])
        finally:
            os.close(writer)  # held by the worker alone, so that its end is the pipe's end
        self._connection = Connection(reader, writable=False)
        assert self.process.stdin is not None
        try:
            with self.process.stdin as stdin:
                stdin.write(pickle.dumps((os.getpid(), job)))
        except BrokenPipeError:
            raise self._died() from None

    def draw(self) -> Drawn:
        while not self._connection.poll(POLL_SECONDS):
            # Normally the pipe's end tells; another child of ours that inherited it would keep it open.
            if self.process.poll() is not None and not self._connection.poll():
                raise self._died()
        try:
            drawn: Drawn
            drawn, state, self._counters = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        self._states[drawn.lane] = state
        return drawn

    def state(self, lane: int) -> dict[str, Any]:
        return self._states[lane]

    def counters(self) -> Mapping[str, int]:
        return self._counters

    def close(self) -> None:
        """Ends the worker; it holds nothing that is worth a farewell."""
        self._connection.close()
        self.process.kill()
        self.process.wait()

    def _died(self) -> UserError:
        return UserError(f"tokenizer process {self.process.pid} {how_it_ended(self.process)}")


def _permit_open_files() -> None:
    """Every lane keeps a shard of every source open; the usual limit of 1024 files is only the usual one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _widen(pipe: int) -> None:
    """Makes the pipe hold more than the usual 64 KiB; where the system refuses, it holds that."""
    if sys.platform == "linux":
        try:
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except PermissionError:
            return


def main(arguments: Sequence[str]) -> None:
    """The worker's life: reads its job from standard input and writes to the pipe whose descriptor is the argument."""
    parent, job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    with Connection(int(arguments[0]), readable=False) as connection:
        try:
            feed = LaneFeed(job, load_tokenizer(job.tokenizer_path))
            while not feed.exhausted():
                drawn = feed.draw()
                connection.send((drawn, feed.state(drawn.lane), feed.counters()))
                if drawn.error:
                    return
        except BrokenPipeError:
            return  # the loader was closed
