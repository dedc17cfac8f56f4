"""Frames: the targets of up to 4,096 consecutive tokens of one document as compressed, checksummed bytes.

A target is a few words with a weight each. Its words are sorted by id, and ids are kept as differences between one word
and the next, so that their high bytes are small numbers, which zstd's entropy coding shortens; bytes of one kind lie
together for the same reason. A frame holds, all little-endian:

    n        uint8 [M]      words of each token
    weights  uint8 [E]      how often each was drawn, E the sum of n; or the two bytes of a float16, low ones first
    ids      2 or 3 times uint8 [E], low bytes first: the difference to the id before it, modulo 2^16 or 2^24
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

FRAME_TOKENS = 4096
MOST_WORDS = 255  # of a token: what n can say
_COMPRESSION_LEVEL = 1
SMALL_VOCAB = 1 << 16
MOST_VOCAB = 1 << 24


class Targets(NamedTuple):
    """The targets of M consecutive tokens, E words in all."""

    n: npt.NDArray[np.uint8]  # [M] words of each token
    ids: npt.NDArray[np.unsignedinteger]  # [E] ascending within a token
    weights: npt.NDArray[np.generic]  # [E] uint8 counts of draws, or float16


class DamagedFrame(Exception):
    """The bytes are not those that were written, or not a frame; the message says how that shows."""


def encode(targets: Targets, vocab_size: int) -> bytes:
    """The frame of `targets`, whose ids are below `vocab_size`."""
    wide = np.dtype("<u2") if vocab_size <= SMALL_VOCAB else np.dtype("<u4")
    ids = targets.ids.astype(wide)
    differences = ids.copy()
    differences[1:] -= ids[:-1]
    parts = [
        targets.n.tobytes(),
        _planes(targets.weights, targets.weights.dtype.itemsize),
        _planes(differences, wide.itemsize),
    ]
    if wide.itemsize == 4:  # modulo 2^24: the fourth bytes say nothing
        parts[-1] = parts[-1][: 3 * len(ids)]
    return zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL, write_checksum=True).compress(b"".join(parts))


def decode(frame: bytes | memoryview, n_tokens: int, vocab_size: int, weight_dtype: np.dtype[np.generic]) -> Targets:
    """The targets of `n_tokens` tokens. Raises DamagedFrame."""
    id_bytes = 2 if vocab_size <= SMALL_VOCAB else 3
    width = weight_dtype.itemsize + id_bytes
    try:
        if zstandard.frame_content_size(frame) > n_tokens * (1 + MOST_WORDS * width):
            raise DamagedFrame("it claims to hold more than it can")
        content = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
    except zstandard.ZstdError as error:
        raise DamagedFrame(str(error)) from None
    n = content[:n_tokens]
    n_words = int(n.sum(dtype=np.int64))
    if len(content) != n_tokens + n_words * width:
        raise DamagedFrame(f"it holds {len(content)} bytes")
    weights, planes = np.split(content[n_tokens:], [n_words * weight_dtype.itemsize])
    ids = _ids(planes.reshape(id_bytes, n_words))
    if n_words and int(ids.max()) >= vocab_size:
        raise DamagedFrame(f"it names token id {int(ids.max())} of a vocabulary of {vocab_size}")
    return Targets(n, ids, weights if weight_dtype.itemsize == 1 else _halves(weights.reshape(2, n_words)))


def _planes(values: npt.NDArray[np.generic], width: int) -> bytes:
    """The lowest bytes of all values, then the next ones, and so on."""
    little = values.astype(values.dtype.newbyteorder("<"), copy=False)
    return np.ascontiguousarray(little.view(np.uint8).reshape(-1, width).T).tobytes()


def _ids(planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.unsignedinteger]:
    wide = np.uint16 if len(planes) == 2 else np.uint32
    differences = planes[0].astype(wide)
    for place, plane in enumerate(planes[1:], start=1):
        differences |= plane.astype(wide) << np.array(8 * place, wide)
    ids = np.cumsum(differences, dtype=wide)
    return ids if wide is np.uint16 else ids & np.uint32(0xFFFFFF)


def _halves(planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
    return np.ascontiguousarray(planes.T).view("<f2").reshape(-1)
