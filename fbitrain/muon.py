"""Muon for matrices that ZeRO has cut up: an orthogonal update needs the whole matrix, and one rank computes it.

DeepSpeed 0.19.8 has a Muon of its own. It orthogonalizes before it clips, so that max_grad_norm shrinks the update
itself and lr loses its unit, and its number of Newton-Schulz iterations is fixed. Here the gradient is clipped first,
as for AdamW, and momentum stays where ZeRO has put the gradient: only what lies on several ranks travels.

Letters: N out_features, K in_features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fbitrain.partition import Placement

# Jordan et al. 2024 (kellerjordan.github.io/posts/muon): the quintic whose slope at 0 is steepest.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUND_ELEMENTS = 2**26  # of matrices, per rank, that are exchanged and orthogonalized at one time


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """A matrix [N, K] with the singular vectors of `matrix` and singular values of about 1 (0.7 to 1.2), in its dtype.

    `steps` Newton-Schulz iterations of the quintic polynomial; a matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    # By the largest entry first: squares of small gradients would vanish. Then the norm is at least 1, or 0.
    x = x / x.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    x = x / x.norm().clamp_min(1)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def update_size(rows: int, columns: int, convention: str) -> float:
    """What multiplies the orthogonal matrix [rows, columns]; `convention` is MuonConfig.update_size."""
    return math.sqrt(max(1.0, rows / columns)) if convention == "spectral" else 0.2 * math.sqrt(max(rows, columns))


def matrix_update(momentum: Tensor, rows: Sequence[int], steps: int, convention: str) -> Tensor:
    """size · O for each matrix of `rows` rows in `momentum` [N, K], one above the other; without rows it is one."""
    blocks = torch.split(momentum, list(rows)) if rows else (momentum,)
    sizes = [update_size(block.shape[0], block.shape[1], convention) for block in blocks]
    return torch.cat([orthogonalize(block, steps) * size for block, size in zip(blocks, sizes, strict=True)])


@dataclass(frozen=True)
class Matrix:
    """One matrix of a flat buffer, the rows of what is fused in it, and the rank that orthogonalizes it."""

    placement: Placement
    rows: tuple[int, ...]
    owner: int


def plan_rounds(placed: Sequence[Placement], rows: Sequence[tuple[int, ...]], world_size: int) -> list[list[Matrix]]:
    """Who orthogonalizes what, in rounds whose matrices fit memory; the same on every rank.

    A matrix that lies on one rank is that rank's. The others go, largest first, to the rank with least to do.
    """
    rounds: list[list[int]] = [[]]
    elements = 0
    for i, placement in enumerate(placed):
        size = math.prod(placement.shape)
        if rounds[-1] and elements + size > ROUND_ELEMENTS * world_size:
            rounds.append([])
            elements = 0
        rounds[-1].append(i)
        elements += size
    return [[Matrix(placed[i], rows[i], owner) for i, owner in _owners(placed, each, world_size)] for each in rounds]


def _owners(placed: Sequence[Placement], indices: Sequence[int], world_size: int) -> list[tuple[int, int]]:
    load = dict.fromkeys(range(world_size), 0)
    owners: dict[int, int] = {}
    work = {i: math.prod(placed[i].shape) * min(placed[i].shape) for i in indices}
    for i in sorted(indices, key=lambda i: (len(placed[i].shares) > 1, -work[i], i)):
        shares = placed[i].shares
        owners[i] = shares[0].rank if len(shares) == 1 else min(load, key=lambda rank: (load[rank], rank))
        load[owners[i]] = load.get(owners[i], 0) + work[i]
    return sorted(owners.items())


@dataclass(frozen=True)
class MuonSettings:
    """What is the same in every step."""

    momentum: float
    ns_steps: int
    convention: str
    dtype: torch.dtype  # of the iteration and of what ranks exchange
    device: torch.device  # where they happen; the flat buffers may lie in host memory


@torch.no_grad()
def muon_step(
    flat: Tensor, state: dict[str, Any], rounds: Sequence[Sequence[Matrix]], lr: float, decay: float, how: MuonSettings
) -> None:
    """Updates this rank's `flat` (fp32, with its gradient) in place; collective where matrices lie on several ranks.

    `state` keeps the momentum, and under "update_squares" the sum of squares of what this rank just added.
    """
    momentum, gradient = state["momentum"], flat.grad
    assert gradient is not None
    momentum.lerp_(gradient, 1 - how.momentum)
    lookahead = gradient.lerp_(momentum, how.momentum)  # Nesterov's; the gradient is not needed any more
    squares = torch.zeros((), dtype=torch.float32, device=flat.device)
    flat.mul_(1 - lr * decay)
    for matrices in rounds:
        for placement, update in _orthogonal(matrices, lookahead, how):
            share = placement.share_of(dist.get_rank())
            assert share is not None
            update = update.to(flat.device, torch.float32)
            placement.view(flat, share).add_(update, alpha=-lr)
            squares += update.square().sum()
    state["update_squares"] = squares.mul_(lr * lr)


def _orthogonal(matrices: Sequence[Matrix], lookahead: Tensor, how: MuonSettings) -> Iterator[tuple[Placement, Tensor]]:
    """(placement, this rank's share of the update, flattened) for each matrix that this rank holds something of."""
    rank = dist.get_rank()
    for matrix in matrices:
        if len(matrix.placement.shares) == 1 and matrix.owner == rank:
            yield matrix.placement, _update(matrix, _own_share(matrix, lookahead, how), how)
    spread = [matrix for matrix in matrices if len(matrix.placement.shares) > 1]
    if not spread:  # and no other rank waits for this one
        return
    owned = [(matrix, share) for matrix in spread if matrix.owner == rank for share in matrix.placement.shares]
    held = [(matrix, share) for matrix in spread if (share := matrix.placement.share_of(rank))]
    pieces = iter(
        _all_to_all(
            [(matrix.owner, _own_share(matrix, lookahead, how)) for matrix, _ in held],
            [(share.rank, share.stop - share.start) for _, share in owned],
            how,
        )
    )
    back = []
    for matrix in (matrix for matrix in spread if matrix.owner == rank):
        whole = torch.cat([next(pieces) for _ in matrix.placement.shares])
        update = _update(matrix, whole, how)
        back += [(share.rank, update[share.start : share.stop]) for share in matrix.placement.shares]
    returned = _all_to_all(back, [(matrix.owner, share.stop - share.start) for matrix, share in held], how)
    for (matrix, _), update in zip(held, returned, strict=True):
        yield matrix.placement, update


def _own_share(matrix: Matrix, lookahead: Tensor, how: MuonSettings) -> Tensor:
    share = matrix.placement.share_of(dist.get_rank())
    assert share is not None
    return matrix.placement.view(lookahead, share).to(how.device, how.dtype)


def _update(matrix: Matrix, momentum: Tensor, how: MuonSettings) -> Tensor:
    whole = momentum.view(matrix.placement.shape)
    return matrix_update(whole, matrix.rows, how.ns_steps, how.convention).flatten()


def _all_to_all(
    sent: Sequence[tuple[int, Tensor]], wanted: Sequence[tuple[int, int]], how: MuonSettings
) -> list[Tensor]:
    """Sends (destination, piece)s; returns the pieces (source, elements) that are `wanted`, in their order. Collective.

    What goes from one rank to another is sent in the order in which it is wanted.
    """
    ranks = range(dist.get_world_size())
    outgoing = [[piece for to, piece in sent if to == rank] for rank in ranks]
    incoming = [sum(size for source, size in wanted if source == rank) for rank in ranks]
    flat = torch.cat([piece for pieces in outgoing for piece in pieces] or [torch.empty(0, dtype=how.dtype)])
    received = torch.empty(sum(incoming), dtype=how.dtype, device=how.device)
    lengths = [sum(piece.numel() for piece in pieces) for pieces in outgoing]
    dist.all_to_all_single(received, flat.to(how.device), incoming, lengths)
    ends = list(itertools.accumulate(incoming, initial=0))
    found = []
    for source, size in wanted:
        found.append(received[ends[source] : ends[source] + size])
        ends[source] += size
    return found
