"""Frames give back what was put in, and nothing else."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from fbitrain.targets.frames import MOST_WORDS, DamagedFrame, FrameFormat, Targets

COUNTS, HALVES = np.dtype("u1"), np.dtype("<f2")


def made(seed: int, n: list[int], vocab: int, dtype: np.dtype[np.generic]) -> Targets:
    generator = np.random.default_rng(seed)
    ids = [np.sort(generator.choice(min(vocab, 4096), size, replace=False)) for size in n]
    flat = (np.concatenate([*ids, np.empty(0, np.int64)]) * (vocab // min(vocab, 4096))).astype(np.uint32)
    weights = generator.integers(1, 256, len(flat)).astype(dtype)
    return Targets(np.array(n, np.uint8), flat, weights)


sizes = st.lists(st.integers(0, MOST_WORDS), min_size=1, max_size=30)
vocabularies = st.sampled_from([1, 2, 256, 2048, 4096, 4097, 49152, 65536, 65537, 152064, 1 << 24])


@given(st.integers(0, 99), sizes, vocabularies, st.booleans())
def test_a_frame_gives_its_targets_back(seed: int, n: list[int], vocab: int, counts: bool) -> None:
    dtype = COUNTS if counts else HALVES
    targets = made(seed, [min(size, vocab) for size in n], vocab, dtype)
    form = FrameFormat(vocab, dtype)
    found = form.decode(form.encode(targets), len(n))
    for there, here in zip(found, targets, strict=True):
        assert there.dtype == (here.dtype if here is not targets.ids else form.no_words.ids.dtype)
        np.testing.assert_array_equal(there, here)


@pytest.mark.parametrize("large", [0, 1, 254, 255, 256, 2999])
def test_large_counts_are_kept_wherever_they_stand(large: int) -> None:
    """Few of 3,000: the steps from one to the next are longer than a byte can say."""
    weights = np.ones(3000, np.uint8)
    weights[large:] = np.where(np.arange(3000 - large) % 1000 == 0, 255, 14)
    targets = Targets(np.full(30, 100, np.uint8), np.tile(np.arange(100, dtype=np.uint16), 30), weights)
    form = FrameFormat(49152, COUNTS)
    np.testing.assert_array_equal(form.decode(form.encode(targets), 30).weights, weights)


@given(st.integers(0, 10_000), st.integers(0, 7), st.booleans())
def test_a_flipped_bit_is_found(at: int, bit: int, counts: bool) -> None:
    form = FrameFormat(49152, COUNTS if counts else HALVES)
    frame = bytearray(form.encode(made(3, [5, 0, 17, 50] * 20, 49152, COUNTS if counts else HALVES)))
    frame[at % len(frame)] ^= 1 << bit
    with pytest.raises(DamagedFrame, match="its checksum differs"):
        form.decode(bytes(frame), 80)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 10, 200, -1])
def test_a_cut_frame_is_damaged(kept: int) -> None:
    form = FrameFormat(49152, COUNTS)
    with pytest.raises(DamagedFrame):
        form.decode(form.encode(made(3, [5, 0, 17, 50] * 20, 49152, COUNTS))[:kept], 80)


def checked(body: bytes) -> bytes:
    """A frame whose checksum is right."""
    return struct.pack("<I", zlib.crc32(body)) + body


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=8), st.sampled_from([300, 49152, 152064]), st.booleans())
def test_bytes_with_a_right_checksum_that_are_no_frame(at: int, new: bytes, vocab: int, counts: bool) -> None:
    """They are other targets or damage, and nothing worse."""
    form = FrameFormat(vocab, COUNTS if counts else HALVES)
    body = bytearray(form.encode(made(3, [5, 0, 17, 50] * 5, vocab, COUNTS if counts else HALVES))[4:])
    body[at % len(body) : at % len(body) + len(new)] = new
    try:
        n, ids, weights = form.decode(checked(bytes(body)), 20)
    except DamagedFrame:
        return
    assert len(n) == 20
    assert n.sum() == len(ids) == len(weights)
    assert ids.max() < vocab


def test_an_id_beyond_the_vocabulary_is_damage() -> None:
    frame = FrameFormat(49152, COUNTS).encode(made(3, [5, 7], 49152, COUNTS))
    with pytest.raises(DamagedFrame, match=r"token id \d+ of a vocabulary of 5000"):
        FrameFormat(5000, COUNTS).decode(frame, 2)


def test_a_frame_of_other_sizes_is_damage() -> None:
    form = FrameFormat(300, COUNTS)
    frame = form.encode(made(3, [5, 7], 300, COUNTS))
    for n_tokens in (1, 3):
        with pytest.raises(DamagedFrame):
            form.decode(frame, n_tokens)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(DamagedFrame, match="claims to hold more than it can"):
        form.decode(checked(struct.pack("<I", 0) + bomb), 2)
    with pytest.raises(DamagedFrame, match="claims to hold more than it can"):
        form.decode(checked(struct.pack("<I", 1 << 31)), 2)
