"""Frames: the targets of up to 4,096 consecutive tokens of one document as compressed, checksummed bytes.

A target is a few words with a weight each; its words are sorted by id. Reading has to keep up with training on one
thread, so entropy coding, zstd's, is asked of few bytes, and every other step is a pass of vector instructions over all
words. A frame of M tokens with E words holds, all little-endian:

    checksum  uint32  CRC-32 of all that follows
    E         uint32
    content   zstd, in blocks, so that bytes of one kind have a Huffman table of their own:
        upper   what ids have above their lowest byte. Of a vocabulary of up to 4,096 words pairs of it. Of others their
                second bytes, and of more than 65,536 words their third ones, as uint8 [E, with zeros up to a multiple
                of 8] and as differences within each eight: of the integer that the eight are, to itself shifted by a
                byte, so that one multiplication sums them up
        n       uint8 [M]  words of each token
        counts  where weights count draws, pairs of them, those above 15 as 15; then for some words, every count above
                14 among them, uint8 [L]: words since the one before, and uint8 [L]: the count
        high    where weights are float16, uint8 [E]: their upper bytes
    low       uint8 [E]  the lowest byte of every id: as good as random, which compression would only slow
    low half  where weights are float16, uint8 [E]: their lower bytes

Pairs are uint8 [E / 2, rounded up] of values below 16: in the lower four bits those of the first half of the words, in
the upper four those of the second half.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

FRAME_TOKENS = 4096
MOST_WORDS = 255  # of a token: what n can say
MOST_VOCAB = 1 << 24
_TINY_VOCAB, _SMALL_VOCAB = 1 << 12, 1 << 16
_LARGE = 15  # the count that is given in full, elsewhere
_MOST_STEP = 255  # words from one count that is given in full to the next
_SUMS = np.uint64(0x0101010101010101)
_CHECKSUM, _HEADER = struct.Struct("<I"), struct.Struct("<II")

Bytes = npt.NDArray[np.uint8]


class Targets(NamedTuple):
    """The targets of M consecutive tokens, E words in all."""

    n: Bytes  # [M] words of each token
    ids: npt.NDArray[np.unsignedinteger]  # [E] ascending within a token
    weights: npt.NDArray[np.generic]  # [E] uint8 counts of draws, or float16


class DamagedFrame(Exception):
    """The bytes are not those that were written, or not a frame; the message says how that shows."""


class FrameFormat:
    """Frames of ids below `vocab_size` with weights of `weight_dtype`, uint8 or float16. For one thread, as zstd is."""

    def __init__(self, vocab_size: int, weight_dtype: np.dtype[np.generic]) -> None:
        self._vocab_size, self._weight_dtype = vocab_size, weight_dtype
        self._id_dtype = np.dtype(np.uint16 if vocab_size <= _SMALL_VOCAB else np.uint32)
        self._pairs = vocab_size <= _TINY_VOCAB  # so are the upper parts of ids
        self._n_upper = 1 if vocab_size <= _SMALL_VOCAB else 2
        self._n_low = weight_dtype.itemsize  # planes of bytes that are stored as they are
        self._decompressor = zstandard.ZstdDecompressor()
        # Of one token that has no words.
        self.no_words = Targets(np.zeros(1, np.uint8), np.empty(0, self._id_dtype), np.empty(0, weight_dtype))

    def encode(self, targets: Targets) -> bytes:
        """The frame of `targets`."""
        low, *upper = _planes(targets.ids.astype(np.uint32))[: 1 + self._n_upper]
        lows = [low]
        if self._n_low == 1:
            counts, steps, large = _short_counts(targets.weights)
            weights = [counts, np.concatenate([steps, large])]
        else:
            low_half, high = _planes(targets.weights)
            weights, lows = [high], [low, low_half]
        upper = [_paired(plane) if self._pairs else _differences(plane) for plane in upper]
        content = _compressed([*upper, targets.n, *weights])
        body = b"".join([_CHECKSUM.pack(len(low)), content, *(plane.tobytes() for plane in lows)])
        return _CHECKSUM.pack(zlib.crc32(body)) + body

    def decode(self, frame: bytes | memoryview, n_tokens: int) -> Targets:
        """The targets of `n_tokens` tokens. Raises DamagedFrame."""
        n_words, content, lows = self._opened(memoryview(frame), n_tokens)
        n_upper = self._upper_bytes(n_words)
        n = content[n_upper : n_upper + n_tokens].copy()  # so that the content need not be kept
        if len(n) != n_tokens or int(n.sum()) != n_words:
            raise DamagedFrame(f"its tokens do not have {n_words} words together")
        ids = _joined([lows[0], *self._upper(content[:n_upper], n_words)], self._id_dtype)
        if n_words and int(ids.max()) >= self._vocab_size:
            raise DamagedFrame(f"it names token id {int(ids.max())} of a vocabulary of {self._vocab_size}")
        weights = content[n_upper + n_tokens :]
        if self._n_low == 1:
            return Targets(n, ids, _counts(weights, n_words))
        if len(weights) != n_words:
            raise DamagedFrame(f"it has {len(weights)} weights of {n_words} words")
        return Targets(n, ids, _joined([lows[1], weights], np.dtype(np.uint16)).view(np.float16))

    def _opened(self, frame: memoryview, n_tokens: int) -> tuple[int, Bytes, Bytes]:
        """The number of words, the content, and the planes of low bytes."""
        if len(frame) < _HEADER.size:
            raise DamagedFrame(f"it has {len(frame)} bytes")
        checksum, n_words = _HEADER.unpack_from(frame)
        if zlib.crc32(frame[_CHECKSUM.size :]) != checksum:
            raise DamagedFrame("its checksum differs")
        low_at = len(frame) - self._n_low * n_words
        compressed = frame[_HEADER.size : max(_HEADER.size, low_at)]
        most = self._upper_bytes(n_words) + n_tokens + _paired_bytes(n_words) + 2 * n_words
        try:
            if low_at < _HEADER.size or zstandard.frame_content_size(compressed) > most:
                raise DamagedFrame("it claims to hold more than it can")
            content = np.frombuffer(self._decompressor.decompress(compressed), np.uint8)
        except zstandard.ZstdError as error:
            raise DamagedFrame(str(error)) from None
        return n_words, content, np.frombuffer(frame, np.uint8)[low_at:].reshape(self._n_low, n_words)

    def _upper_bytes(self, n_words: int) -> int:
        return _paired_bytes(n_words) if self._pairs else self._n_upper * _padded(n_words)

    def _upper(self, content: Bytes, n_words: int) -> Bytes:
        """[1 or 2, E]"""
        if self._pairs:
            return _unpaired(content, n_words)[None]
        planes: Bytes = (content.view(np.uint64) * _SUMS).view(np.uint8).reshape(self._n_upper, -1)
        return planes[:, :n_words]


def _compressed(parts: Sequence[Bytes]) -> bytes:
    """zstd's frame of `parts`, a block each. Draws do not recur, so it is asked for few matches: they take time."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, window_log=18
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(sum(len(part) for part in parts))
    blocks = []
    for part in parts:
        blocks += [compressor.compress(part.tobytes()), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    return b"".join([*blocks, compressor.flush()])


def _planes(values: npt.NDArray[np.generic]) -> Bytes:
    """The lowest bytes of all values, then the next ones, and so on."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return np.ascontiguousarray(little.view(np.uint8).reshape(-1, values.dtype.itemsize).T)


def _joined(planes: Sequence[Bytes], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The values whose bytes are in `planes`, the lowest first."""
    *lower, values = planes
    for plane in reversed(lower):
        values = np.left_shift(values, 8, dtype=dtype)
        values |= plane
    return values


def _padded(n_words: int) -> int:
    return -(-n_words // 8) * 8


def _differences(plane: Bytes) -> Bytes:
    """What multiplication by _SUMS makes `plane` again."""
    padded = np.zeros(_padded(len(plane)), np.uint8)
    padded[: len(plane)] = plane
    eights = padded.view(np.uint64)
    differences: Bytes = (eights - (eights << np.uint64(8))).view(np.uint8)
    return differences


def _paired_bytes(n_values: int) -> int:
    return (n_values + 1) // 2


def _paired(values: Bytes) -> Bytes:
    halves = np.zeros((2, _paired_bytes(len(values))), np.uint8)
    halves.reshape(-1)[: len(values)] = values
    pairs: Bytes = halves[0] | halves[1] << 4
    return pairs


def _unpaired(pairs: Bytes, n_values: int) -> Bytes:
    halves = np.empty((2, len(pairs)), np.uint8)
    np.bitwise_and(pairs, 15, out=halves[0])
    np.right_shift(pairs, 4, out=halves[1])
    return halves.reshape(-1)[:n_values]


def _short_counts(counts: npt.NDArray[np.generic]) -> tuple[Bytes, Bytes, Bytes]:
    """Pairs of all counts, steps from each to the next that is given in full, and those."""
    small = counts.astype(np.uint8)
    # Every 255th is given in full too: then no step needs more than a byte.
    places = np.flatnonzero((small >= _LARGE) | (np.arange(len(small)) % _MOST_STEP == 0))
    return _paired(np.minimum(small, _LARGE)), np.diff(places, prepend=0).astype(np.uint8), small[places]


def _counts(content: Bytes, n_words: int) -> Bytes:
    """Of what _short_counts gives, one behind the other. Raises DamagedFrame."""
    n_pairs = _paired_bytes(n_words)
    n_steps, odd = divmod(len(content) - n_pairs, 2)
    places = np.cumsum(content[n_pairs : n_pairs + n_steps], dtype=np.int64)
    if n_steps < 0 or odd or (n_steps and places[-1] >= n_words):
        raise DamagedFrame(f"it has {len(content)} bytes of counts for its {n_words} words")
    counts = _unpaired(content[:n_pairs], n_words)
    counts[places] = content[n_pairs + n_steps :]
    return counts
