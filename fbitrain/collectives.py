"""Collectives that another library calls, marked as such for whoever follows a rank through its step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

Waiting = Callable[[str], AbstractContextManager[None]]

# Methods of DeepSpeed's communication backend that ZeRO calls in a step.
COLLECTIVES = (
    *("all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast"),
    *("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all_single", "barrier"),
)


def timed_collective(name: str, call: Callable[..., Any], waiting: Waiting) -> Callable[..., Any]:
    """`call` inside `waiting(name)`; where it returns a handle, the wait for that as well."""

    @functools.wraps(call)
    def timed(*args: Any, **kwargs: Any) -> Any:
        with waiting(name):
            handle = call(*args, **kwargs)
        return TimedHandle(handle, name, waiting) if hasattr(handle, "wait") else handle

    marked: Callable[..., Any] = torch.compiler.disable(timed)  # type: ignore[no-untyped-call]
    return marked


class TimedHandle:
    """What an asynchronous collective returns, with a `wait` that is timed; all else is as in the handle itself."""

    def __init__(self, handle: Any, name: str, waiting: Waiting) -> None:
        self._handle, self._name, self._waiting = handle, name, waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._waiting(f"the end of {self._name}"):
            return self._handle.wait(*args, **kwargs)
