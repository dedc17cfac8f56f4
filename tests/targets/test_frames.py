"""Frames give back what was put in, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fbitrain.targets.frames import MOST_WORDS, DamagedFrame, Targets, decode, encode

COUNTS, HALVES = np.dtype("u1"), np.dtype("<f2")


def made(seed: int, n: list[int], vocab: int, dtype: np.dtype[np.generic]) -> Targets:
    generator = np.random.default_rng(seed)
    ids = [np.sort(generator.choice(min(vocab, 4096), size, replace=False)) for size in n]
    flat = (np.concatenate([*ids, np.empty(0, np.int64)]) * (vocab // min(vocab, 4096))).astype(np.uint32)
    weights = generator.integers(1, 256, len(flat)).astype(dtype)
    return Targets(np.array(n, np.uint8), flat, weights)


sizes = st.lists(st.integers(0, MOST_WORDS), min_size=1, max_size=30)


@given(st.integers(0, 99), sizes, st.sampled_from([256, 2048, 49152, 65536, 65537, 152064, 1 << 24]), st.booleans())
def test_a_frame_gives_its_targets_back(seed: int, n: list[int], vocab: int, counts: bool) -> None:
    dtype = COUNTS if counts else HALVES
    targets = made(seed, n, vocab, dtype)
    found = decode(encode(targets, vocab), len(n), vocab, dtype)
    for there, here in zip(found, targets, strict=True):
        np.testing.assert_array_equal(there, here)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_is_found(at: int, bit: int) -> None:
    targets = made(3, [5, 0, 17, 50] * 20, 49152, COUNTS)
    frame = bytearray(encode(targets, 49152))
    frame[at % len(frame)] ^= 1 << bit
    try:
        found = decode(bytes(frame), 80, 49152, COUNTS)
    except DamagedFrame:
        return
    # zstd's frame header has bits without a meaning, which change nothing.
    for there, here in zip(found, targets, strict=True):
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("kept", [0, 1, 10, 200])
def test_a_cut_frame_is_damaged(kept: int) -> None:
    frame = encode(made(3, [5, 0, 17, 50] * 20, 49152, COUNTS), 49152)
    with pytest.raises(DamagedFrame):
        decode(frame[:kept], 80, 49152, COUNTS)


def test_an_id_beyond_the_vocabulary_is_damage() -> None:
    frame = encode(made(3, [5, 7], 49152, COUNTS), 49152)
    with pytest.raises(DamagedFrame, match=r"token id \d+ of a vocabulary of 100"):
        decode(frame, 2, 100, COUNTS)


def test_a_frame_of_other_sizes_is_damage() -> None:
    frame = encode(made(3, [5, 7], 300, COUNTS), 300)
    with pytest.raises(DamagedFrame):
        decode(frame, 1, 300, COUNTS)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(DamagedFrame, match="claims to hold more than it can"):
        decode(bomb, 2, 300, COUNTS)
