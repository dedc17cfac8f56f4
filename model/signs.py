"""Watching signs change: one bit per weight is enough to remember what a weight's sign was."""

from __future__ import annotations

from torch import Tensor

from fbitrain.kernels.reference import pack_signs, popcount


def sign_bits(weights: Tensor) -> Tensor:
    """The signs of weights [n], packed into int32 [ceil(n/32)]."""
    return pack_signs(weights)


def count_flips(before: Tensor, after: Tensor) -> Tensor:
    """How many signs differ between two results of sign_bits; an integer scalar on their device."""
    return popcount(before ^ after).sum()
