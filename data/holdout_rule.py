"""Documents held out by their content: `data.heldout_fraction` of all, kept out of training whatever file they lie in.

`fbitrain data holdout config.yaml --out heldout.jsonl.zst` gathers some of them into one shard, for
`data.heldout` (data/commands/holdout.py).
"""

from __future__ import annotations

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: seeds 0 and 1 start far apart


def is_heldout(content_hash: int, seed: int, fraction: float) -> bool:
    """Whether the document with this 64-bit `content_hash` is held out.

    Depends on nothing but the content and the seed: the order, sharding and format of the corpus may change, and every
    copy of a text has the same fate. What a fraction holds out, a larger one holds out too.
    """
    assert 0 <= fraction < 1
    return _mix(content_hash ^ _mix((seed + GOLDEN) & MASK)) < int(fraction * 2.0**64)


def _mix(bits: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection in which every bit depends on every other."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
    return bits ^ (bits >> 31)
