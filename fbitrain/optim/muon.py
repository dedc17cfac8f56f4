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

from fbitrain.optim.partition import Placement

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


@dataclass(frozen=True)
class MatrixForm:
    """How a parameter holds its matrix or matrices."""

    rows: tuple[int, ...] = ()  # of several matrices, one above the other; empty: it is one
    transposed: bool = False  # [K, N], as GPT-2's Conv1D has it


def matrix_update(momentum: Tensor, form: MatrixForm, steps: int, convention: str) -> Tensor:
    """size · O for each matrix in `momentum`, in the shape of `momentum`."""
    whole = momentum.T if form.transposed else momentum  # [N, K]
    blocks = torch.split(whole, list(form.rows)) if form.rows else (whole,)
    sizes = [update_size(block.shape[0], block.shape[1], convention) for block in blocks]
    update = torch.cat([orthogonalize(block, steps) * size for block, size in zip(blocks, sizes, strict=True)])
    return update.T if form.transposed else update


@dataclass(frozen=True)
class Matrix:
    """One parameter of a flat buffer, and the rank that orthogonalizes it."""

    placement: Placement
    form: MatrixForm
    owner: int


@dataclass(frozen=True)
class Plan:
    """Who orthogonalizes what of one flat buffer; the same on every rank."""

    local: tuple[Matrix, ...]  # each lies on one rank, which needs no other for it
    rounds: tuple[tuple[Matrix, ...], ...]  # each lies on several; a round is what is exchanged at one time


def plan_updates(placed: Sequence[Placement], forms: Sequence[MatrixForm], world_size: int) -> Plan:
    """A matrix that lies on one rank is that rank's. The others go, largest first, to the rank with least to do.

    Rounds hold shared matrices only: a round is a collective, for which no rank should wait in the middle of its own.
    """
    load = dict.fromkeys(range(world_size), 0)
    work = [math.prod(placement.shape) * min(placement.shape) for placement in placed]
    owners: dict[int, int] = {}
    for i in sorted(range(len(placed)), key=lambda i: (len(placed[i].shares) > 1, -work[i], i)):
        shares = placed[i].shares
        owners[i] = shares[0].rank if len(shares) == 1 else min(load, key=lambda rank: (load[rank], rank))
        load[owners[i]] = load.get(owners[i], 0) + work[i]
    matrices = [
        Matrix(placement, form, owners[i]) for i, (placement, form) in enumerate(zip(placed, forms, strict=True))
    ]
    local = tuple(matrix for matrix in matrices if len(matrix.placement.shares) == 1)
    spread = [matrix for matrix in matrices if len(matrix.placement.shares) > 1]
    return Plan(local, tuple(_rounds(spread, ROUND_ELEMENTS * world_size)))


def _rounds(matrices: Sequence[Matrix], most: int) -> Iterator[tuple[Matrix, ...]]:
    """Cuts `matrices` into runs of at most `most` elements, one matrix at least."""
    some: list[Matrix] = []
    elements = 0
    for matrix in matrices:
        size = math.prod(matrix.placement.shape)
        if some and elements + size > most:
            yield tuple(some)
            some, elements = [], 0
        some.append(matrix)
        elements += size
    if some:
        yield tuple(some)


@dataclass(frozen=True)
class MuonSettings:
    """What is the same in every step."""

    momentum: float
    ns_steps: int
    convention: str
    dtype: torch.dtype  # of the iteration and of what ranks exchange
    device: torch.device  # where they happen; the flat buffers may lie in host memory


@torch.no_grad()
def muon_step(flat: Tensor, state: dict[str, Any], plan: Plan, lr: float, decay: float, settings: MuonSettings) -> None:
    """Updates this rank's `flat` (fp32, with its gradient) in place; collective where matrices lie on several ranks.

    `state` keeps the momentum, and under "update_squares" the sum of squares of what this rank just added.
    """
    momentum, gradient = state["momentum"], flat.grad
    assert gradient is not None
    momentum.lerp_(gradient, 1 - settings.momentum)
    lookahead = gradient.lerp_(momentum, settings.momentum)  # Nesterov's; the gradient is not needed any more
    squares = torch.zeros((), dtype=torch.float32, device=flat.device)
    flat.mul_(1 - lr * decay)
    for placement, update in itertools.chain(
        _local_updates(plan.local, lookahead, settings),
        *(_shared_updates(some, lookahead, settings) for some in plan.rounds),
    ):
        share = placement.share_of(dist.get_rank())
        assert share is not None
        update = update.to(flat.device, torch.float32)
        placement.view(flat, share).add_(update, alpha=-lr)
        squares += update.square().sum()
    state["update_squares"] = squares.mul_(lr * lr)


def _local_updates(
    matrices: Sequence[Matrix], lookahead: Tensor, settings: MuonSettings
) -> Iterator[tuple[Placement, Tensor]]:
    """(placement, update, flattened) of each matrix that lies on this rank alone."""
    for matrix in matrices:
        if matrix.owner == dist.get_rank():
            yield matrix.placement, _update(matrix, _own_share(matrix, lookahead, settings), settings)


def _shared_updates(
    matrices: Sequence[Matrix], lookahead: Tensor, settings: MuonSettings
) -> Iterator[tuple[Placement, Tensor]]:
    """(placement, this rank's share of the update, flattened) of each matrix it holds something of. Collective."""
    rank = dist.get_rank()
    owned = [(matrix, share) for matrix in matrices if matrix.owner == rank for share in matrix.placement.shares]
    held = [(matrix, share) for matrix in matrices if (share := matrix.placement.share_of(rank))]
    pieces = iter(
        _all_to_all(
            [(matrix.owner, _own_share(matrix, lookahead, settings)) for matrix, _ in held],
            [(share.rank, share.stop - share.start) for _, share in owned],
            settings,
        )
    )
    back = []
    for matrix in (matrix for matrix in matrices if matrix.owner == rank):
        whole = torch.cat([next(pieces) for _ in matrix.placement.shares])
        update = _update(matrix, whole, settings)
        back += [(share.rank, update[share.start : share.stop]) for share in matrix.placement.shares]
    returned = _all_to_all(back, [(matrix.owner, share.stop - share.start) for matrix, share in held], settings)
    for (matrix, _), update in zip(held, returned, strict=True):
        yield matrix.placement, update


def _own_share(matrix: Matrix, lookahead: Tensor, settings: MuonSettings) -> Tensor:
    share = matrix.placement.share_of(dist.get_rank())
    assert share is not None
    return matrix.placement.view(lookahead, share).to(settings.device, settings.dtype)


def _update(matrix: Matrix, momentum: Tensor, settings: MuonSettings) -> Tensor:
    whole = momentum.view(matrix.placement.shape)
    return matrix_update(whole, matrix.form, settings.ns_steps, settings.convention).flatten()


def _all_to_all(
    sent: Sequence[tuple[int, Tensor]], wanted: Sequence[tuple[int, int]], settings: MuonSettings
) -> list[Tensor]:
    """Sends (destination, piece)s; returns the pieces (source, elements) that are `wanted`, in their order. Collective.

    What goes from one rank to another is sent in the order in which it is wanted.
    """
    ranks = range(dist.get_world_size())
    outgoing = [[piece for to, piece in sent if to == rank] for rank in ranks]
    incoming = [sum(size for source, size in wanted if source == rank) for rank in ranks]
    flat = torch.cat(
        [piece for pieces in outgoing for piece in pieces]
        or [torch.empty(0, dtype=settings.dtype, device=settings.device)]
    )
    received = torch.empty(sum(incoming), dtype=settings.dtype, device=settings.device)
    lengths = [sum(piece.numel() for piece in pieces) for pieces in outgoing]
    dist.all_to_all_single(received, flat, incoming, lengths)
    ends = list(itertools.accumulate(incoming, initial=0))
    found = []
    for source, size in wanted:
        found.append(received[ends[source] : ends[source] + size])
        ends[source] += size
    return found
