"""Where ZeRO keeps each parameter: which rank holds which of its elements, and where in that rank's flat buffers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Share:
    """What one rank holds of a parameter: its elements [start, stop), flattened, at `offset` in the rank's buffer."""

    rank: int
    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Placement:
    """A parameter and the shares of all ranks, in the order of their ranks; ranks without a share are left out.

    At stage 0 every rank holds all: the one share is then the caller's own.
    """

    parameter: nn.Parameter
    shape: tuple[int, ...]  # whole
    flat: Tensor  # fp32, the caller's own buffer that the optimizer updates; other parameters lie in it, too
    shares: tuple[Share, ...]

    def share_of(self, rank: int) -> Share | None:
        return next((share for share in self.shares if share.rank == rank), None)

    def view(self, tensor: Tensor, share: Share) -> Tensor:
        """The elements of the caller's `share` in `tensor`, which is laid out as `flat` is: a view, [stop - start]."""
        return tensor.detach().view(-1).narrow(0, share.offset, share.stop - share.start)


def placements(zero: Any, stage: int) -> Iterator[Placement]:
    """All parameters that are trained, in the same order on every rank; `zero` is DeepSpeed's optimizer."""
    world_size = dist.get_world_size()
    if stage == 0:
        return _replicated(zero)
    return _by_pieces(zero, world_size) if stage == 3 else _by_buffers(zero, world_size)


def _replicated(zero: Any) -> Iterator[Placement]:
    """Stage 0: the optimizer updates the parameters themselves."""
    for group in getattr(zero, "optimizer", zero).param_groups:
        for parameter in group["params"]:
            share = Share(dist.get_rank(), 0, parameter.numel(), 0)
            yield Placement(parameter, tuple(parameter.shape), parameter, (share,))


def _by_buffers(zero: Any, world_size: int) -> Iterator[Placement]:
    """Stages 1 and 2: a group's parameters lie one after another in a buffer, cut into world_size equal partitions."""
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        size = flat.numel()
        offsets = zero.round_robin_bit16_offsets[group]
        for parameter, offset in zip(zero.round_robin_bit16_groups[group], offsets, strict=True):
            shares = []
            for rank in range(world_size):
                start, stop = max(offset, rank * size), min(offset + parameter.numel(), (rank + 1) * size)
                if start < stop:
                    shares.append(Share(rank, start - offset, stop - offset, start - rank * size))
            yield Placement(parameter, tuple(parameter.shape), flat, tuple(shares))


def _by_pieces(zero: Any, world_size: int) -> Iterator[Placement]:
    """Stage 3: every parameter is cut into world_size equal pieces, the last one padded; sub-groups share a buffer."""
    for parameters, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in parameters:
            piece, size = parameter.partition_numel(), math.prod(parameter.ds_shape)
            shares = [Share(r, r * piece, min((r + 1) * piece, size), offset) for r in range(world_size)]
            yield Placement(
                parameter, tuple(parameter.ds_shape), flat, tuple(share for share in shares if share.start < share.stop)
            )
            offset += piece
