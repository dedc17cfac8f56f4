"""Runs one function on many jobs, in processes. A process that dies is an error; no process outlives the caller."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from fbitrain.base.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def n_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], n_workers: int) -> Generator[Result, None, None]:
    """work(job) for each of `jobs`, in their order, by `n_workers` processes; with one, in this process.

    `work` is a function of a module, and pickled. A UserError that it raises is raised here; any other exception, and a
    process killed, is reported as a UserError, the traceback being on stderr. Closing the iterator ends the processes.
    """
    n_workers = min(n_workers, len(jobs))
    if n_workers <= 1:
        yield from map(work, jobs)
        return
    waiting = list(enumerate(jobs))[::-1]
    finished: dict[int, Result] = {}
    n_yielded = 0
    with ExitStack() as stack:
        workers = {}
        for _ in range(n_workers):
            connection, process = _start(work, stack)
            workers[connection] = process
            _send(connection, waiting.pop())
        while workers:
            for connection in [ready for ready in wait(list(workers)) if isinstance(ready, Connection)]:
                number, outcome = _receive(connection, workers[connection])
                finished[number] = outcome
                if waiting:
                    _send(connection, waiting.pop())
                else:
                    del workers[connection]
            while n_yielded in finished:
                yield finished.pop(n_yielded)
                n_yielded += 1


def _start(work: Callable[[Any], Any], stack: ExitStack) -> tuple[Connection, SpawnProcess]:
    # Not forked: the caller has threads (progress bars, downloads), whose locks a fork would copy as they stand.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    with theirs:
        process.start()
    stack.callback(process.join)
    stack.callback(process.kill)
    return stack.enter_context(closing(ours)), process


def _send(connection: Connection, job: tuple[int, Any]) -> None:
    with suppress(BrokenPipeError):  # a process that has died is reported when its answer is waited for
        connection.send(job)


def _receive(connection: Connection, process: SpawnProcess) -> tuple[int, Any]:
    try:
        number, outcome = connection.recv()
    except (EOFError, OSError):
        process.join()
        code = process.exitcode or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        raise UserError(
            f"worker process {process.pid} {how}; its own message, if any, is above: give it more memory, or use fewer "
            "--workers"
        ) from None
    if isinstance(outcome, UserError):
        raise outcome
    return number, outcome


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends us
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    while True:
        try:
            number, job = connection.recv()
        except EOFError:
            return
        try:
            outcome: Any = work(job)
        except UserError as error:
            outcome = error
        connection.send((number, outcome))


def _leave_with_parent() -> None:
    """A caller that is killed cannot end us; and a job may take long."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
