"""Documents out of one shard: .jsonl, .jsonl.gz or .jsonl.zst, from any line on, surviving what is damaged.

A damaged line or a damaged file never ends the reading of a corpus. It comes out as a BadRecord in the place where a
document would have been, for the caller to count and report.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import orjson
import zstandard

from fbitrain.data.shards import DataError, Shard

CHUNK_BYTES = 1 << 18
UTF8_BOM = b"\xef\xbb\xbf"
# `zstd --long=31` needs windows of 2 GiB to be read back; the decoder allocates only what a frame asks for.
ZSTD_MAX_WINDOW = 1 << 31
GZIP_WBITS = 31


@dataclass(frozen=True)
class Position:
    """Where a line begins."""

    line: int = 0  # counted from 0
    offset: int = 0  # bytes before it, after decompression


@dataclass(frozen=True)
class Record:
    """One document."""

    at: Position
    after: Position  # where the next line begins
    text: str


@dataclass(frozen=True)
class BadRecord:
    """A line that holds no document, or the place where the rest of a file is lost."""

    path: str
    line: int  # counted from 0
    reason: str

    def __str__(self) -> str:
        return f"{self.path}, line {self.line + 1}: {self.reason}"


class _Decompressor(Protocol):
    """What zlib's and zstandard's objects for one frame (gzip: member) have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Damaged(Exception):
    """The file cannot be read beyond this point."""


def read_records(
    shard: Shard, text_key: str = "text", start: Position = Position(), part: int = 0, n_parts: int = 1
) -> Iterator[Record | BadRecord]:
    """The documents in lines `part`, `part + n_parts`, … of `shard`, in order, from line `start` on.

    Blank lines are passed over, and a byte order mark at the start of the file is dropped. A plain .jsonl is entered
    at `start.offset`, a compressed one is decompressed and skipped up to `start.line`. Where a file is cut off or its
    compression is damaged the last item is a BadRecord; it is given to one part only, the one that owned the lost line.
    """
    at = start
    try:
        for raw in _lines_from(shard, start):
            after = Position(at.line + 1, at.offset + len(raw) + 1)
            if at.line % n_parts == part:
                text = _document(raw.removeprefix(UTF8_BOM) if at.line == 0 else raw, text_key)
                if isinstance(text, _Flaw):
                    yield BadRecord(shard.path, at.line, text.reason)
                elif text is not None:
                    yield Record(at, after, text)
            at = after
    except (_Damaged, OSError, zlib.error, zstandard.ZstdError) as error:
        if at.line % n_parts == part:
            yield BadRecord(shard.path, at.line, f"the rest of the file is lost: {error}")


def read_record(shard: Shard, text_key: str, at: Position) -> Record:
    """The document at `at`. Raises DataError where there is none."""
    record = next(read_records(shard, text_key, at), None)
    if not isinstance(record, Record) or record.at != at:
        raise DataError(f"{shard.path}, line {at.line + 1}: the document of the checkpoint is no longer there")
    return record


@dataclass(frozen=True)
class _Flaw:
    reason: str


def _document(raw: bytes, text_key: str) -> str | _Flaw | None:
    """The text in one line, None for a blank line, or what is wrong with it."""
    if not raw.strip():
        return None
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as decode_error:
            return _Flaw(f"not UTF-8: {decode_error.reason} at byte {decode_error.start}")
        return _Flaw(f"not JSON: {error}")
    if not isinstance(value, dict):
        return _Flaw(f"not a JSON object but {type(value).__name__}")
    if text_key not in value:
        return _Flaw(f"has no field {text_key!r}")
    text = value[text_key]
    if not isinstance(text, str):
        return _Flaw(f"field {text_key!r} is not a string but {type(text).__name__}")
    return text or _Flaw(f"field {text_key!r} is empty")


def _lines_from(shard: Shard, start: Position) -> Iterator[bytes]:
    """Lines without their newline, from line `start.line` on."""
    with open(shard.path, "rb") as file:
        if shard.path.endswith(".zst"):
            lines = _lines(_decompressed(file, _new_zstd))
        elif shard.path.endswith(".gz"):
            lines = _lines(_decompressed(file, lambda: zlib.decompressobj(wbits=GZIP_WBITS)))
        else:
            file.seek(start.offset)
            yield from _lines(iter(lambda: file.read(CHUNK_BYTES), b""))
            return
        for line, raw in enumerate(lines):
            if line >= start.line:
                yield raw


def _new_zstd() -> _Decompressor:
    return zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW).decompressobj()


def _decompressed(file: BinaryIO, new_decompressor: Callable[[], _Decompressor]) -> Iterator[bytes]:
    """The content of all frames. Raises _Damaged where the last frame has no end.

    zstandard's own stream reader takes a cut file for a complete one; only a frame's `eof` tells them apart.
    """
    frame: _Decompressor | None = None
    n_frames = 0
    while data := file.read(CHUNK_BYTES):
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
        raise _Damaged("it is cut off in the middle of a compressed frame")
    if not n_frames:
        raise _Damaged("it is empty, which no compressed file is")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Chunks cut at newlines; a line may span any number of chunks."""
    pieces: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        pieces.append(first)
        if others:
            yield b"".join(pieces)
            yield from others[:-1]
            pieces = [others[-1]]
    if last := b"".join(pieces):
        yield last
