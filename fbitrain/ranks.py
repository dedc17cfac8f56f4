"""Keeping ranks together: what one rank learns, all must know before any of them acts on it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fbitrain.base.errors import UserError, may_pass

T = TypeVar("T")


class StreamError(UserError):
    """The data stream of one rank failed; every rank raises it."""

    restart_mends = True  # most are of a disk or a network; those that are not make no progress either


class DelayedFlag:
    """Whether any rank raised a flag, known to all ranks one call later: so that no rank and no device waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: tuple[Tensor, Callable[[], object]] | None = None  # int32 [1], and what waits until it is shared

    def exchange(self, raised: bool) -> bool:
        """Sends this rank's flag; returns whether any rank had raised its own at the call before. Collective."""
        before, flag = self._sent, torch.full((1,), int(raised), dtype=torch.int32, device=self._device)
        if self._device.type == "cuda":
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)  # in the order of the device's work; this process goes on
            here = torch.empty(1, dtype=torch.int32, pin_memory=True)
            here.copy_(flag, non_blocking=True)
            arrived = torch.Event("cuda")
            arrived.record()
            self._sent = here, arrived.synchronize
        else:
            self._sent = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True).wait
        if before is None:
            return False
        shared, wait = before
        wait()
        return bool(shared.item())

    def forget(self) -> None:
        """Leaves what was sent last without an answer."""
        self._sent = None


def agreed(work: Callable[[], T]) -> T:
    """Runs `work` on every rank; if it raises a user's error on any, all raise it, so that none waits for ever."""
    result: T
    fault: Exception | None = None
    message, mends = "", None
    try:
        result = work()
    except UserError as error:
        message, mends = str(error), may_pass(error)
    except Exception as error:  # a fault of ours must not leave the other ranks waiting either
        fault, message = error, f"rank {dist.get_rank()} failed: {type(error).__name__}: {error}"
        mends = True
    messages: list[tuple[str, bool | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(messages, (message, mends))
    if fault:
        raise fault
    for found, mends in messages:
        if found:
            raised = on_all_ranks(UserError(found))
            raised.restart_mends = mends
            raise raised
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


def hosts() -> list[str]:
    """The host of every rank. Collective."""
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, socket.gethostname())
    return found


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
