"""Looking for damage on all ranks: each reads a part of a checkpoint's files, dealt out by their sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from fbitrain.checkpoint_folders import Look
from fbitrain.checkpoint_marker import fault_of_file, inventory, told
from fbitrain.ranks import agreed, from_rank_0

T = TypeVar("T")
Entries = Mapping[str, Any]  # file -> what COMPLETE.json says of it


def deal(entries: Entries, n: int) -> list[dict[str, Any]]:
    """Each file to one of `n` ranks: the largest first, always to the rank that has the fewest bytes to read."""
    shares: list[dict[str, Any]] = [{} for _ in range(n)]
    loads = [0] * n
    for name in sorted(entries, key=lambda name: (-_bytes(entries[name]), name)):
        rank = loads.index(min(loads))
        shares[rank][name] = entries[name]
        loads[rank] += _bytes(entries[name])
    return shares


def _bytes(entry: Any) -> int:
    size = entry.get("bytes") if isinstance(entry, dict) else None
    return size if isinstance(size, int) else 0


def with_shared_look(work: Callable[[Look], T]) -> T:
    """Runs `work` on rank 0 and gives its result to every rank. Collective.

    `work` may ask its argument, as often as it likes, what is wrong with a checkpoint (checkpoint_marker.damage): all
    ranks then read it together. A user's error of `work` is raised on all ranks.
    """

    def part() -> T | None:
        if dist.get_rank():
            while asked := _broadcast(None):
                _read_together(*asked)
            return None
        try:
            return work(_damage)
        finally:
            _broadcast(None)

    result = agreed(part)
    return from_rank_0(lambda: result)  # type: ignore[return-value]


def _damage(folder: Path) -> str:
    """On rank 0: what is wrong with a checkpoint; the other ranks have been waiting to be asked."""
    entries, faults = inventory(folder)
    shares = deal(entries, dist.get_world_size())
    _broadcast((folder, shares))
    found = _read_together(folder, shares)
    return told([*faults, *(found[name] for name in sorted(found))])


def _read_together(folder: Path, shares: list[dict[str, Any]]) -> dict[str, str]:
    """File -> what is wrong with it. Collective."""
    mine = {name: fault_of_file(folder, name, entry) for name, entry in shares[dist.get_rank()].items()}
    gathered: list[dict[str, str]] = [{}] * len(shares)
    dist.all_gather_object(gathered, mine)
    return {name: fault for found in gathered for name, fault in found.items()}


def _broadcast(
    question: tuple[Path, list[dict[str, Any]]] | None,
) -> tuple[Path, list[dict[str, Any]]] | None:
    """Rank 0's question, on every rank; None: there is no further one."""
    asked = [question]
    dist.broadcast_object_list(asked, src=0)
    return asked[0]
