"""Sizes of the binary format: how many words a row of bits takes and what shape its scales have. No torch.

Letters: N out_features, K in_features, G group size.
"""

from __future__ import annotations

WORD_BITS = 32  # weights per packed int32 word
MAX_K = 2**24  # 127·K fits in int32, so sums of int8 activations never overflow
SCALES = ("column", "row", "tensor", "group")  # patterns of α
MODES = ("float", "int8")  # what the linear ops do with their activations
MAX_EXPERTS = 64  # scales that mixture_linear mixes
NARROW_COLUMNS = 2**16  # up to here partial_linear's column numbers are uint16, beyond int32


def n_words(k: int) -> int:
    """Words that hold `k` bits; the last one is padded with zeros."""
    return (k + WORD_BITS - 1) // WORD_BITS


def interleaved_words(n: int, k: int) -> int:
    """Words of the second copy of a weight's bits for single tokens: whole panels of 64 rows, of whole 256 columns."""
    return -(-n // 64) * 64 * (-(-n_words(k) // 8) * 8)


def scale_shape(scale: str, n: int, k: int, group_size: int) -> tuple[int, int]:
    """Shape of α (and of β, where there is one) for a weight [n, k].

    `column` [1, k], `row` [n, 1], `tensor` [1, 1], `group` [n, k / group_size]; `group_size` is read for `group` only.
    Raises ValueError for an unknown pattern or a group size that does not divide k.
    """
    if scale == "group":
        if group_size < 1 or k % group_size:
            raise ValueError(f"in_features={k} is not a multiple of group_size={group_size}")
        return n, k // group_size
    shapes = {"column": (1, k), "row": (n, 1), "tensor": (1, 1)}
    if scale not in shapes:
        raise ValueError(f"scale={scale!r} is unknown; choose {', '.join(SCALES[:-1])} or {SCALES[-1]}")
    return shapes[scale]
