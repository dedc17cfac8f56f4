"""The lines of a file, plain or compressed (.gz, .zst), from any byte on; what is damaged is noticed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, Protocol

import zstandard

from fbitrain.base.errors import UserError

CHUNK_BYTES = 1 << 18
# Decompressed at once: small, because repetitive text shrinks to a thousandth, and all of it comes back together.
COMPRESSED_CHUNK_BYTES = 1 << 15
# `zstd --long=31` needs windows of 2 GiB to be read back; the decoder allocates only what a frame asks for.
ZSTD_MAX_WINDOW = 1 << 31
GZIP_WBITS = 31


class Damaged(Exception):
    """The file cannot be read beyond this point. Its message says why."""


class _Decompressor(Protocol):
    """What zlib's and zstandard's objects for one frame (gzip: member) have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def read_lines(path: str, offset: int = 0) -> Iterator[bytes]:
    """Lines of `path` without their newline, from byte `offset` on, which is counted after decompression.

    A plain file is entered there, a compressed one is decompressed up to it. Memory does not grow with the file; a
    line, however long, is held at most three times. Raises Damaged where the content ends before its time, and
    UserError where the system does not give it: that says nothing against the file, and would lose all of it.
    """
    try:
        with open(path, "rb") as file:
            if path.endswith(".zst"):
                yield from _lines(_without(offset, _decompressed(file, _new_zstd)))
            elif path.endswith(".gz"):
                yield from _lines(_without(offset, _decompressed(file, _new_gzip)))
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


def _new_zstd() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).decompressobj()


def _new_gzip() -> _Decompressor:
    return zlib.decompressobj(wbits=GZIP_WBITS)


def _decompressed(file: BinaryIO, new_decompressor: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """The content of all frames. Raises Damaged where the last frame has no end.

    zstandard's own stream reader takes a cut file for a complete one; only a frame's `eof` tells them apart.
    """
    frame: _Decompressor | None = None
    n_frames = 0
    while data := file.read(COMPRESSED_CHUNK_BYTES):
        while data:
            if frame is None:
                # Zero bytes after a complete frame are padding (gzip permits it).
                data = data.lstrip(b"\0") if n_frames else data
                if not data:
                    break
                frame = new_decompressor()
            yield frame.decompress(data)
            data = b""
            if frame.eof:
                data, frame, n_frames = frame.unused_data, None, n_frames + 1
    if frame is not None:
        raise Damaged("it is cut off in the middle of a compressed frame")
    if not n_frames:
        raise Damaged("it is empty, which no compressed file is")


def _without(n_bytes: int, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """`chunks` from byte `n_bytes` on."""
    for chunk in chunks:
        yield chunk[n_bytes:]
        n_bytes = max(0, n_bytes - len(chunk))


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Chunks cut at newlines; a line may span any number of chunks."""
    pieces: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        if others:
            line, pieces = b"".join(pieces), [others.pop()]
            yield line
            yield from others
    if last := b"".join(pieces):
        yield last
