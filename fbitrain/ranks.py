"""Keeping ranks together: what one rank learns, all must know before any of them acts on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar, cast

import torch.distributed as dist
from tqdm import tqdm

from fbitrain.base.errors import UserError

T = TypeVar("T")


class StreamError(UserError):
    """The data stream of one rank failed; every rank raises it."""


class StopSignal:
    """Remembers SIGTERM and Ctrl-C until the ranks agree, at the end of a step, that one of them was told to stop."""

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False
        self.name = "a signal to another rank"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested = True
            self.name = signal.Signals(number).name
            # Not print: the signal may have come in the middle of one.
            os.write(1, f"{self.name}: saving at the end of this step, then stopping\n".encode())


def agreed(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; if it raises a user's error on any, all raise it, so that none waits for ever."""
    result: T
    fault: Exception | None = None
    message = ""
    try:
        result = work()
    except UserError as error:
        message = str(error)
    except Exception as error:  # a fault of ours must not leave the other ranks waiting either
        fault, message = error, f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}"
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    if fault:
        raise fault
    for found in messages:
        if found:
            raise on_all_ranks(UserError(found))
    return result


def from_rank_0(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 alone and gives its result to every rank; a user's error there is raised on all."""
    found = [agreed(lambda: work() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(found, src=0)
    return cast(T, found[0])


def on_all_ranks(error: UserError) -> UserError:
    """Marks an error that every rank raises, so that only rank 0 prints it."""
    error.on_all_ranks = True
    return error


def progress_bar(total: int, description: str, unit: str) -> tqdm[Any]:
    """A bar on a terminal, drawn by rank 0 alone where every rank does the same work; also without a process group."""
    quiet = dist.is_initialized() and dist.get_rank() != 0
    return tqdm(total=total, desc=description, unit=unit, disable=True if quiet else None)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
