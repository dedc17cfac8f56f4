"""Keeping ranks together: what one rank learns, all must know before any of them acts on it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

import torch.distributed as dist

from fbitrain.data.shards import DataError
from fbitrain.errors import UserError

T = TypeVar("T")


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
            print(f"{self.name}: saving at the end of this step, then stopping", flush=True)


def agreed(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; if it raises a user's error on any, all raise it, so that none waits for ever."""
    result: T
    message = ""
    try:
        result = work()
    except (UserError, DataError) as error:
        message = str(error)
    messages: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for found in messages:
        if found:
            raise on_all_ranks(UserError(found))
    return result


def on_all_ranks(error: UserError) -> UserError:
    """Marks an error that every rank raises, so that only rank 0 prints it."""
    error.on_all_ranks = True
    return error


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
