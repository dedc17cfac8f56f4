"""A checkpoint's .safetensors files, written and checked a megabyte at a time. No torch.

The file is safetensors': 8 bytes that hold the header's length, the header as JSON, the tensors one after another. The
header has a checksum of each tensor in its metadata. Its room is kept free until the tensors are written, so each of
their bytes is read once, and no more than CHUNK bytes are copied at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fbitrain.base.files import replacing
from fbitrain.checkpoint_sums import BLOCK_BYTES, Checksum

CHUNK = 8 * BLOCK_BYTES
Chunks = Iterable[npt.NDArray[np.uint8]]  # a tensor's bytes, cut into pieces of CHUNK and a rest


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    key: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    n_bytes: int


def write_tensors(path: Path, tensors: Sequence[Stored], contents: Iterable[Chunks]) -> None:
    """Replaces `path` by a file of `tensors`, whose bytes `contents` gives in the same order; on disk at the end.

    Tensors with larger numbers come first, so that each begins at a multiple of its numbers' size.
    """
    sums = {tensor.key: 2**64 - 1 for tensor in tensors}  # no sum has more digits
    room = -(-len(_header(tensors, sums)) // 8) * 8
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(bytes(8 + room))
        for tensor, chunks in zip(tensors, contents, strict=True):
            taken = Checksum()
            for chunk in chunks:
                taken.add(chunk)
                file.write(chunk.data)
            sums[tensor.key] = taken.value()
        file.seek(0)
        file.write(room.to_bytes(8, "little") + _header(tensors, sums).ljust(room))


def _header(tensors: Sequence[Stored], sums: Mapping[str, int]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"checksums": json.dumps(sums)}}
    start = 0
    for tensor in tensors:
        stop = start + tensor.n_bytes
        header[tensor.key] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, stop]}
        start = stop
    return json.dumps(header).encode()


def pieces(data: npt.NDArray[np.uint8]) -> Chunks:
    """Bytes that lie in memory, [n]."""
    return (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))


def pieces_of_file(descriptor: int, start: int, n_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Bytes [start, start + n_bytes) of an open file. A piece is overwritten by the next one.

    Raises ValueError where the file ends before.
    """
    buffer = np.empty(min(CHUNK, n_bytes), dtype=np.uint8)
    stop = start + n_bytes
    while start < stop:
        wanted, filled = min(CHUNK, stop - start), 0
        while filled < wanted:
            n_read = os.preadv(descriptor, [buffer[filled:wanted].data], start + filled)
            if not n_read:
                raise ValueError("it ends in the middle of a tensor")
            filled += n_read
        yield buffer[:wanted]
        start += wanted


def fault_of_tensors(path: Path) -> str:
    """The first tensor of a file whose bytes are not those that were written; empty if there is none.

    The header has been compared before. Raises ValueError, KeyError or TypeError if it is none all the same.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        sums = json.loads(header.pop("__metadata__")["checksums"])
        for key, entry in header.items():
            start, stop = entry["data_offsets"]
            taken = Checksum()
            for chunk in pieces_of_file(file.fileno(), 8 + length + start, stop - start):
                taken.add(chunk)
            if taken.value() != sums[key]:
                return f"{path.name} fails its checksum at {key}"
    return ""
