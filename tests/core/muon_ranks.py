"""A few Muon steps on ranks that share matrices as ZeRO does: `muon_ranks.py LAYOUT RANKS OUT`; test_muon.py runs it.

LAYOUT: buffer (stages 1 and 2) or pieces (stage 3). OUT gets the matrices, whole, and the last step's squares.
"""

from __future__ import annotations

import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn

from fbitrain.optim.muon import MatrixForm, MuonSettings, muon_step, plan_updates
from fbitrain.optim.partition import Placement, Share

CPU = torch.device("cpu")
LAYOUT_SHAPES = [(6, 4), (5, 7), (3, 3), (16, 2), (9, 11)]


def layouts(kind: str, world_size: int) -> tuple[list[tuple[Share, ...]], int]:
    """The shares of LAYOUT_SHAPES and a rank's buffer size: one buffer cut anywhere (stages 1, 2), or pieces (3)."""
    sizes = [rows * columns for rows, columns in LAYOUT_SHAPES]
    if kind == "pieces":
        shares, offset = [], 0
        for size in sizes:
            piece = -(-size // world_size)
            bounds = [(r, min(r * piece, size), min((r + 1) * piece, size)) for r in range(world_size)]
            shares.append(tuple(Share(r, left, right, offset) for r, left, right in bounds if left < right))
            offset += piece
        return shares, offset
    length = -(-sum(sizes) // world_size)
    shares, start = [], 0
    for size in sizes:
        mine = []
        for rank in range(world_size):
            left, right = max(start, rank * length), min(start + size, (rank + 1) * length)
            if left < right:
                mine.append(Share(rank, left - start, right - start, left - rank * length))
        shares.append(tuple(mine))
        start += size
    return shares, length


def run_steps(rank: int, world_size: int, kind: str, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    shares, length = layouts(kind, world_size)
    flat = torch.zeros(length)
    placements = [
        Placement(nn.Parameter(torch.empty(0)), shape, flat, some)
        for shape, some in zip(LAYOUT_SHAPES, shares, strict=True)
    ]
    forms = [MatrixForm(), MatrixForm(rows=(2, 3)), MatrixForm(), MatrixForm(), MatrixForm()]
    plan = plan_updates(placements, forms, world_size)
    state = {"momentum": torch.zeros(length)}
    how = MuonSettings(0.9, 3, "spectral", torch.float32, CPU)
    generator = torch.Generator().manual_seed(5)
    squares = torch.zeros(())
    for step in range(3):
        flat.grad = torch.zeros(length)
        for placement in placements:
            whole = torch.randn(placement.shape, generator=generator).flatten()  # the same on every rank
            if share := placement.share_of(rank):
                placement.view(flat.grad, share).copy_(whole[share.start : share.stop])
        muon_step(flat, state, plan, 0.1 / (step + 1), 0.05, how)
        squares = state["update_squares"].clone()
    dist.all_reduce(squares)
    pieces = [
        (i, share.start, placement.view(flat, share).clone())
        for i, placement in enumerate(placements)
        if (share := placement.share_of(rank))
    ]
    torch.save((pieces, squares), f"{out}.{rank}")
    dist.destroy_process_group()


def main(kind: str, world_size: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(run_steps, (world_size, kind, f"{folder}/store", f"{folder}/out"), world_size)
        matrices = [torch.full((rows * columns,), math.nan) for rows, columns in LAYOUT_SHAPES]
        for rank in range(world_size):
            pieces, squares = torch.load(f"{folder}/out.{rank}", weights_only=True)
            for i, start, values in pieces:
                matrices[i][start : start + len(values)] = values
    torch.save(([m.view(shape) for m, shape in zip(matrices, LAYOUT_SHAPES, strict=True)], squares), out)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
