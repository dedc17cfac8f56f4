"""Documents out of one shard: lines of .jsonl, .jsonl.gz or .jsonl.zst, rows of .parquet, surviving what is damaged.

A damaged record or a damaged file never ends the reading of a corpus. It comes out as a BadRecord in the place where a
document would have been, for the caller to count and report. A file that the system does not give is another matter:
nothing is known to be wrong with it, and all of it would be lost without a word.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from fbitrain.data.reading.documents import START, BadRecord, Document, Entry, Position
from fbitrain.data.reading.line_files import MAX_RECORD_BYTES, Damaged, TooLong, read_lines
from fbitrain.data.reading.table_files import Cell, read_cells

PARQUET_SUFFIX = ".parquet"
UTF8_BOM = b"\xef\xbb\xbf"
SURROGATES = re.compile("[\ud800-\udfff]")
REPLACEMENT = "\ufffd"
# An invalid sequence becomes half a surrogate pair at first, which no valid text holds: so it can be counted.
MARK_INVALID = "fbitrain.mark_invalid"
codecs.register_error(MARK_INVALID, lambda error: ("\udfff", error.end))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class RecordFormat:
    """How a record holds its document: SourceConfig's `kind`, and the name of the field or column."""

    kind: str = "text"
    key: str = "text"


class _Flaw(Exception):
    """The record holds no document. The message is a BadRecord's reason."""


def read_entries(
    path: str, format: RecordFormat, start: Position = START, part: int = 0, n_parts: int = 1
) -> Iterator[Entry | BadRecord]:
    """The records on lines `part`, `part + n_parts`, … of `path`, in order, from `start` on, where a record begins.

    Blank lines are no records; a byte order mark at the start of the file is dropped. Where the file is cut off, its
    compression is damaged, or it lacks the column, the last item is a BadRecord; it is given to one part only, the one
    that owned the lost line. Raises UserError for a file that cannot be opened or read.
    """
    line, offset = start.line, start.offset
    try:
        if path.endswith(PARQUET_SUFFIX):
            for cell in read_cells(path, format.key, line):
                if line % n_parts == part:
                    content = TooLong(cell.size) if cell.size > MAX_RECORD_BYTES else cell
                    yield Entry(Position(line), Position(line + 1), cell.size, content)
                line += 1
            return
        for raw in read_lines(path, offset):
            if isinstance(raw, TooLong):
                end = offset + raw.n_bytes + 1
                if line % n_parts == part:
                    yield Entry(Position(line, offset), Position(line + 1, end), raw.n_bytes, raw)
                line, offset = line + 1, end
                continue
            end = offset + len(raw) + 1
            if line % n_parts == part:
                text = raw.removeprefix(UTF8_BOM) if line == 0 else raw
                if text and not text.isspace():
                    yield Entry(Position(line, offset), Position(line + 1, end), len(raw), text)
            line, offset = line + 1, end
    except Damaged as error:
        if line % n_parts == part:
            yield BadRecord(path, line, f"the rest of the file is lost: {error}")


def decode(entry: Entry, format: RecordFormat, path: str) -> Document | BadRecord:
    """The document in `entry`, which `read_entries` gave with the same `format`; `path` is what a BadRecord names."""
    if isinstance(entry.raw, TooLong):
        return BadRecord(path, entry.at.line, str(entry.raw))
    try:
        value = entry.raw.value if isinstance(entry.raw, Cell) else _field(entry.raw, format.key)
        return _ready_made(value, format.key) if format.kind == "token_ids" else _text(value, format.key)
    except _Flaw as flaw:
        return BadRecord(path, entry.at.line, str(flaw))


def _field(raw: bytes, key: str) -> Any:
    """The value of field `key` of the JSON object in `raw`. Raises _Flaw."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = _lenient_json(raw)
    if not isinstance(value, dict):
        raise _Flaw(f"not a JSON object but {type(value).__name__}")
    if key not in value:
        raise _Flaw(f"has no field {key!r}")
    return value[key]


def _lenient_json(raw: bytes) -> Any:
    """What orjson refuses and a corpus holds: invalid UTF-8, halves of surrogate pairs, NaN in the metadata."""
    try:
        return json.loads(raw.decode("utf-8", errors=MARK_INVALID))
    except (ValueError, RecursionError) as error:
        raise _Flaw(f"not JSON: {error}") from None


def _text(value: Any, key: str) -> Document:
    """A string, or its UTF-8 bytes, as a document; what is not Unicode in it is replaced and counted. Raises _Flaw."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors=MARK_INVALID)
    if not isinstance(value, str):
        raise _Flaw(f"field {key!r} is not a string but {type(value).__name__}")
    if not value:
        raise _Flaw(f"field {key!r} is empty")
    try:
        return Document(value, n_bytes=len(value.encode()))
    except UnicodeEncodeError:
        value, n_replaced = SURROGATES.subn(REPLACEMENT, value)
        return Document(value, n_bytes=len(value.encode()), n_replaced=n_replaced)


def _ready_made(value: Any, key: str) -> Document:
    """A list of token ids as a document, uint32 [n]. Raises _Flaw."""
    if not isinstance(value, list):
        raise _Flaw(f"field {key!r} is not a list of token ids but {type(value).__name__}")
    if not value:
        raise _Flaw(f"field {key!r} is empty")
    if wrong := set(map(type, value)) - {int}:  # true is an int to numpy
        raise _Flaw(f"field {key!r} holds {min(kind.__name__ for kind in wrong)} where a token id should be")
    try:
        token_ids: npt.NDArray[np.uint32] = np.array(value, dtype=np.uint32)
    except OverflowError:
        raise _Flaw(f"field {key!r} holds a number that is no token id: {_no_token_id(value)}") from None
    return Document(token_ids=token_ids, bordered=False)


def _no_token_id(ids: list[int]) -> int:
    return next(i for i in ids if not 0 <= i <= np.iinfo(np.uint32).max)
