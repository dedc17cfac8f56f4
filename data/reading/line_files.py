"""The lines of a file, plain or compressed (.gz, .zst), from any byte on; what is damaged is noticed.

Memory is bounded whatever the file holds: a few kilobytes of compressed text may stand for gigabytes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import zstandard

from fbitrain.base.errors import UserError

CHUNK_BYTES = 1 << 18
COMPRESSED_CHUNK_BYTES = 1 << 15
MAX_RECORD_BYTES = 64 << 20  # of a line or a cell: a hundred long books
# `zstd --long=31` needs windows of 2 GiB to be read back; the decoder allocates only what a frame asks for.
ZSTD_MAX_WINDOW = 1 << 31
ZSTD_MAX_BLOCK = 128 << 10
SKIPPABLE = bytes.fromhex("502a4d18")  # magic number of frames to pass over; the first byte may be 50 to 5f
GZIP_WBITS = 31


class Damaged(Exception):
    """The file cannot be read beyond this point. Its message says why."""


@dataclass(frozen=True)
class TooLong:
    """What is left of a line of more than MAX_RECORD_BYTES: it was read past, and is held by nobody."""

    n_bytes: int

    def __str__(self) -> str:
        return f"it has {self.n_bytes:,} bytes, and a record may have {MAX_RECORD_BYTES:,}; divide it"


def read_lines(path: str, offset: int = 0) -> Iterator[bytes | TooLong]:
    """Lines of `path` without their newline, from byte `offset` on, which is counted after decompression.

    A plain file is entered there, a compressed one is decompressed up to it. Memory does not grow with the file; a
    line is held at most three times. Raises Damaged where the content ends before its time, and UserError where the
    system does not give it: that says nothing against the file, and would lose all of it.
    """
    try:
        with open(path, "rb") as file:
            if path.endswith(".zst"):
                yield from _lines(_without(offset, _zstd_content(file)))
            elif path.endswith(".gz"):
                yield from _lines(_without(offset, _gzip_content(file)))
            else:
                file.seek(offset)
                yield from _lines(iter(lambda: file.read(CHUNK_BYTES), b""))
    except (zlib.error, zstandard.ZstdError) as error:
        raise Damaged(str(error)) from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str, error: OSError) -> UserError:
    """What to say where a file is there no more, may not be read, or its disk fails."""
    reason = os.strerror(error.errno) if error.errno else error  # pyarrow's own text has the path once more
    return UserError(f"{path} cannot be read ({reason}); restore it or mend its disk, then start again")


def _gzip_content(file: BinaryIO) -> Iterator[bytes]:
    """The content of all members, at most CHUNK_BYTES at a time. Raises Damaged where the last one has no end."""
    member = None
    n_members = 0
    while data := file.read(COMPRESSED_CHUNK_BYTES):
        while data:
            if member is None:
                # Zero bytes after a complete member are padding.
                data = data.lstrip(b"\0") if n_members else data
                if not data:
                    break
                member = zlib.decompressobj(wbits=GZIP_WBITS)
            while content := member.decompress(data, CHUNK_BYTES):
                yield content
                data = member.unconsumed_tail
            data = b""
            if member.eof:
                data, member, n_members = member.unused_data, None, n_members + 1
    _require_end(member is None, n_members)


def _zstd_content(file: BinaryIO) -> Iterator[bytes]:
    """The content of all frames, one block of at most 128 KiB at a time. Raises Damaged where the last has no end.

    zstandard's own stream reader takes a cut file for a complete one, and its decompressor, the only one whose `eof`
    tells them apart, gives all that its input stands for at once: it is fed block by block (RFC 8878, section 3.1.1).
    """
    n_frames = 0
    while start := _frame_start(file, n_frames):
        if start[1:] == SKIPPABLE[1:] and start[0] & 0xF0 == SKIPPABLE[0]:
            if n_bytes := int.from_bytes(file.read(4), "little"):
                file.seek(n_bytes - 1, os.SEEK_CUR)
                _require_end(len(file.read(1)) == 1, 1)
            n_frames += 1
            continue
        frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).decompressobj()
        for piece in _zstd_blocks(file, start):
            yield frame.decompress(piece)
        _require_end(frame.eof, 1)
        n_frames += 1
    _require_end(True, n_frames)


def _frame_start(file: BinaryIO, n_frames: int) -> bytes:
    """The first four bytes of the next frame; empty at the end. Zero bytes after a complete frame are padding."""
    start = file.read(4)
    while n_frames and start[:1] == b"\0":
        start = start.lstrip(b"\0") or file.read(COMPRESSED_CHUNK_BYTES).lstrip(b"\0")
        if len(start) > 4:
            file.seek(4 - len(start), os.SEEK_CUR)
        start = start[:4] + file.read(4 - len(start[:4]))
    return start


def _zstd_blocks(file: BinaryIO, start: bytes) -> Iterator[bytes]:
    """A frame in pieces: its header, and each block. What makes no sense in them the decompressor says."""
    descriptor = file.read(1)
    yield start + descriptor
    if start != zstandard.FRAME_HEADER or not descriptor:
        return
    single, checksum = descriptor[0] >> 5 & 1, descriptor[0] >> 2 & 1
    size_bytes = (single, 2, 4, 8)[descriptor[0] >> 6]
    yield file.read((not single) + (0, 1, 2, 4)[descriptor[0] & 3] + size_bytes)
    last = False
    while not last:
        head = file.read(3)
        number = int.from_bytes(head, "little")
        last = len(head) < 3 or bool(number & 1)
        n_bytes = 1 if number >> 1 & 3 == 1 else number >> 3  # of a run only the byte is stored that it repeats
        yield head + file.read(min(n_bytes, ZSTD_MAX_BLOCK))
    if checksum:
        yield file.read(4)


def _require_end(complete: bool, n_frames: int) -> None:
    if not complete:
        raise Damaged("it is cut off in the middle of a compressed frame")
    if not n_frames:
        raise Damaged("it is empty, which no compressed file is")


def _without(n_bytes: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """`chunks` from byte `n_bytes` on."""
    for chunk in chunks:
        yield chunk[n_bytes:]
        n_bytes = max(0, n_bytes - len(chunk))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes | TooLong]:
    """Chunks cut at newlines; a line may span any number of chunks."""
    pieces: list[bytes] = []
    n_bytes = 0  # of the line that has begun
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        n_bytes += len(first)
        if n_bytes > MAX_RECORD_BYTES:
            pieces.clear()
        else:
            pieces.append(first)
        if others:
            line, pieces = b"".join(pieces), [others.pop()]
            yield line if n_bytes <= MAX_RECORD_BYTES else TooLong(n_bytes)
            yield from others
            n_bytes = len(pieces[0])
    if n_bytes:
        yield b"".join(pieces) if n_bytes <= MAX_RECORD_BYTES else TooLong(n_bytes)
