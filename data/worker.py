"""Tokenizer processes: a few lanes each, producing sequences ahead of the training process that draws them.

A worker is a plain child process joined by one pipe. The pipe is the bounded queue: a full one makes the worker wait, a
closed one makes it leave, and one that ends tells the parent that the worker is gone. multiprocessing is not used
because its children import the caller's main module, and with it torch.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import numpy.typing as npt

from fbitrain.data.plan import LanePlan
from fbitrain.data.shards import DataError
from fbitrain.data.stream import Lane
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer

# Not `-m`: the module would be __main__ there, and its classes others than the parent's.
COMMAND = "import sys; from fbitrain.data.worker import main; main(sys.argv[1:])"
PIPE_BYTES = 1 << 20  # what Linux grants everyone: 60 sequences of 2048 tokens ahead
POLL_SECONDS = 5.0
IGNORED_SIGNALS = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Drawn:
    """What came out of a lane: a sequence, or the news that there is none, or the error that ends the run."""

    lane: int
    tokens: npt.NDArray[np.int64] | None  # [T+1]; None: the lane has no documents
    state: dict[str, Any]  # of the lane, after these tokens
    notes: tuple[str, ...] = ()  # for the user's eyes
    last_bad: str = ""  # the last bad record among the notes
    error: str = ""


@dataclass(frozen=True)
class Job:
    """A worker's task: lanes in the order in which they are drawn, each with the state it goes on from."""

    lanes: tuple[tuple[LanePlan, dict[str, Any]], ...]
    tokenizer_path: str


def produce(job: Job, tokenizer: Tokenizer) -> Iterator[Drawn]:
    """Draws from the lanes in turn; from a lane without documents once. Ends only with the last lane or an error."""
    lanes = []
    for plan, state in job.lanes:
        try:
            lanes.append(Lane(plan, tokenizer, state))
        except DataError as error:
            yield Drawn(plan.lane, None, state, error=str(error))
            return
    while lanes:
        for lane in list(lanes):
            drawn = _draw(lane)
            yield drawn
            if drawn.error:
                return
            if drawn.tokens is None:
                lanes.remove(lane)


def _draw(lane: Lane) -> Drawn:
    error = ""
    tokens = None
    try:
        tokens = next(lane, None)
    except DataError as data_error:
        error = str(data_error)
    notes, last_bad = lane.take_notes()
    return Drawn(lane.plan.lane, tokens, lane.state(), notes, last_bad, error)


class WorkerProcess:
    """The parent's end of one worker. Iterates over what its lanes give."""

    def __init__(self, job: Job) -> None:
        reader, writer = os.pipe()
        _widen(writer)
        try:
            self.process = _start(writer)
        finally:
            os.close(writer)  # held by the worker alone, so that its end is the pipe's end
        self._connection = Connection(reader, writable=False)
        assert self.process.stdin is not None
        try:
            with self.process.stdin as stdin:
                stdin.write(pickle.dumps((os.getpid(), job)))
        except BrokenPipeError:
            raise self._died() from None

    def __iter__(self) -> Iterator[Drawn]:
        return self

    def __next__(self) -> Drawn:
        while not self._connection.poll(POLL_SECONDS):
            # Normally the pipe's end tells; another child of ours that inherited it would keep it open.
            if self.process.poll() is not None and not self._connection.poll():
                raise self._died()
        try:
            drawn: Drawn = self._connection.recv()
            return drawn
        except (EOFError, OSError):
            raise self._died() from None

    def close(self) -> None:
        """Ends the worker; it holds nothing that is worth a farewell."""
        self._connection.close()
        self.process.kill()
        self.process.wait()

    def _died(self) -> DataError:
        self.process.wait()
        code = self.process.returncode
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return DataError(f"tokenizer process {self.process.pid} {how}; its own message, if any, is above (memory?)")


def _start(pipe: int) -> subprocess.Popen[bytes]:
    # A child inherits the signal mask. Signals that a launcher sends to the process group, or to every descendant of a
    # rank, must leave the workers alone until the rank has saved.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, str(pipe)],
            stdin=subprocess.PIPE,
            pass_fds=[pipe],
            # The parent's own search path, and not the folder it happens to run in.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    with Connection(int(arguments[0]), readable=False) as connection:
        try:
            for drawn in produce(job, load_tokenizer(job.tokenizer_path)):
                connection.send(drawn)
        except BrokenPipeError:
            return  # the loader was closed


def _leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, however it went and whoever else holds the pipe."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
