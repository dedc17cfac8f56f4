"""Documents held out by their content: `data.heldout_fraction` of all, kept out of training whatever file they lie in.

`fbitrain data holdout config.yaml --out heldout.jsonl.zst` gathers some of them into one shard, for
`data.heldout` (data/commands/holdout.py).
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: seeds 0 and 1 start far apart

_Bits = TypeVar("_Bits", int, npt.NDArray[Any])


def is_heldout(content_hash: int, seed: int, fraction: float) -> bool:
    """Whether the document with this 64-bit `content_hash` is held out.

    Depends on nothing but the content and the seed: the order, sharding and format of the corpus may change, and every
    copy of a text has the same fate. What a fraction holds out, a larger one holds out too.
    """
    return _mix(content_hash ^ _seed_bits(seed)) < _threshold(fraction)


def are_heldout(content_hashes: npt.NDArray[np.uint64], seed: int, fraction: float) -> npt.NDArray[np.bool_]:
    """`is_heldout` of each of `content_hashes` [n], as bools [n]."""
    heldout: npt.NDArray[np.bool_] = _mix(content_hashes ^ np.uint64(_seed_bits(seed))) < np.uint64(
        _threshold(fraction)
    )
    return heldout


def _threshold(fraction: float) -> int:
    assert 0 <= fraction < 1
    return int(fraction * 2.0**64)


def _seed_bits(seed: int) -> int:
    return _mix((seed + GOLDEN) & MASK)


def _mix(bits: _Bits) -> _Bits:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection in which every bit depends on every other."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
    mixed: _Bits = bits ^ (bits >> 31)
    return mixed
