"""Runs one function on many jobs, in processes. A process that dies is an error; no process outlives the caller."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from fbitrain.base.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


def n_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Job], Result], jobs: Sequence[Job], n_workers: int) -> Generator[Result, None, None]:
    """work(job) for each of `jobs`, in their order, by `n_workers` processes; with one, in this process.

    `work` is a function of a module, and pickled. What it raises is raised here; a process killed is a UserError.
    Closing the iterator ends the processes.
    """
    n_workers = min(n_workers, len(jobs))
    if n_workers <= 1:
        yield from map(work, jobs)
        return
    # Not forked: the caller has threads (progress bars, downloads), whose locks a fork would copy as they stand.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n_workers, mp_context=context, initializer=_prepare_worker)
    results = pool.map(work, jobs)
    workers = list(pool._processes.values())
    try:
        yield from results
    except BrokenProcessPool:
        pool.shutdown()  # which terminates the other processes
        codes = [worker.exitcode or 0 for worker in workers]
        code = next((code for code in codes if code not in (0, -signal.SIGTERM)), -signal.SIGTERM)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        raise UserError(
            f"a worker process {how}; its own message, if any, is above: give it more memory, or use fewer --workers"
        ) from None
    finally:
        for worker in workers:  # the pool itself would let them finish their jobs, which may take long
            worker.kill()
        pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends us
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A caller that is killed cannot end us; and a job may take long."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
