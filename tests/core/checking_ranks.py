"""Ranks that look for damage together: `checking_ranks.py RANKS CHECKPOINT OUT`; test_checkpoint_check.py runs it.

One file after another is changed in its last byte. OUT gets, for each file (and first for none), what each rank was
told, and what it read.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fbitrain import checkpoint_check
from fbitrain.base.errors import UserError
from fbitrain.checkpoint_folders import Look
from fbitrain.checkpoint_marker import MARKER, fault_of_file


def look(rank: int, n_ranks: int, folder: Path, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.store", rank=rank, world_size=n_ranks)
    read: list[str] = []

    def reading(folder: Path, name: str, entry: Any) -> str:
        read.append(name)
        return fault_of_file(folder, name, entry)

    checkpoint_check.fault_of_file = reading  # type: ignore[assignment]
    found = []
    for name in ["", *sorted(path.name for path in folder.iterdir() if path.name != MARKER), "all"]:
        read.clear()
        dist.barrier()
        if rank == 0:
            change(folder, name)
        dist.barrier()
        found.append({"changed": name, "told": told(folder), "read": [*read]})
        dist.barrier()
        if rank == 0:
            change(folder, name)
    Path(f"{out}.{rank}").write_text(json.dumps(found))
    dist.destroy_process_group()


def told(folder: Path) -> str:
    """As at a start: rank 0 may refuse the checkpoint, and all ranks raise that."""

    def choose(look: Look) -> str:
        if fault := look(folder):
            raise UserError(fault)
        return "whole"

    try:
        return checkpoint_check.with_shared_look(choose)
    except UserError as error:
        return str(error)


def change(folder: Path, name: str) -> None:
    for path in folder.iterdir():
        if path.name != MARKER and name in (path.name, "all"):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)


if __name__ == "__main__":
    n_ranks, folder, out = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=look, args=(rank, n_ranks, folder, out)) for rank in range(n_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))
