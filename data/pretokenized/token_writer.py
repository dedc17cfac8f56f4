"""Writes the files of one pretokenized shard, or of a part of one. The format is in token_shards.py."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fbitrain.base.errors import UserError
from fbitrain.base.files import replacing, sha256_of
from fbitrain.data.pretokenized.token_shards import (
    BAD,
    RECORD,
    RECORDS,
    REPORT,
    TOKENS,
    FileReport,
    Records,
    ShardReport,
    read_report,
    sizes_differ,
    with_ending,
)

BATCH_RECORDS = 4096  # held before they are written, or fewer
BATCH_TOKENS = 1 << 22  # of large documents
HASH_BYTES = 1 << 24  # read at a time

Ids = npt.NDArray[Any]


class ShardWriter:
    """Appends records and their tokens to two files, and counts."""

    def __init__(self, tokens: HashedFile, records: HashedFile, dtype: str) -> None:
        self._tokens, self._records = tokens, records
        self._dtype = np.dtype(dtype)
        self._rows: Records = np.zeros(BATCH_RECORDS, RECORD)
        self._ids: list[Ids] = []
        self._n_held = 0  # tokens in _ids
        self.n_records = self.n_documents = self.n_tokens = self.n_bytes = 0
        self.bad: dict[str, str] = {}
        self.lost: tuple[int, str] | None = None

    def add(self, row: Any, ids: Ids) -> None:
        """`row` is a RECORD, whose first_token becomes what it is in this file."""
        i = len(self._ids)
        self._rows[i] = row
        self._rows["first_token"][i] = self.n_tokens
        self._ids.append(ids.astype(self._dtype, copy=False))
        self.n_tokens += len(ids)
        self._n_held += len(ids)
        if i + 1 == BATCH_RECORDS or self._n_held >= BATCH_TOKENS:
            self.flush()

    def flush(self) -> None:
        rows = self._rows[: len(self._ids)]
        if not len(rows):
            return
        self._records.write(rows.tobytes())
        self._tokens.write(np.concatenate(self._ids).tobytes())
        self.n_records += len(rows)
        self.n_documents += int((rows["flags"] & BAD == 0).sum())
        self.n_bytes += int(rows["n_bytes"].sum())
        self._ids, self._n_held = [], 0


class HashedFile:
    """A file that is written once, with the hash of what it holds."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    def report(self) -> FileReport:
        return FileReport(self.size, self._digest.hexdigest())


@contextmanager
def hashed_files(target: Path, endings: Sequence[str], report: Callable[[], bytes]) -> Iterator[list[HashedFile]]:
    """Yields a new file of `target` for each of `endings`; `report()` becomes its report, written last.

    Raises UserError where a file cannot be written.
    """
    try:
        with_ending(target, REPORT).unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            paths = [stack.enter_context(replacing(with_ending(target, ending))) for ending in endings]
            yield [HashedFile(stack.enter_context(path.open("wb"))) for path in paths]
        with replacing(with_ending(target, REPORT)) as path:
            path.write_bytes(report())
    except OSError as error:
        raise UserError(
            f"{target.parent} cannot be written to ({error.strerror or error}); mend that and run the command again: "
            "what is finished stays"
        ) from None


@contextmanager
def writing(target: Path, origin: ShardReport) -> Iterator[ShardWriter]:
    """Yields a writer of the files of `target`; what it has counted becomes their report, written last.

    `origin` says what the tokens are made of. Raises UserError where a file cannot be written.
    """

    def report() -> bytes:
        return replace(
            origin,
            tokens=tokens.report(),
            records=records.report(),
            n_records=writer.n_records,
            n_documents=writer.n_documents,
            n_tokens=writer.n_tokens,
            n_bytes=writer.n_bytes,
            bad=writer.bad,
            lost=writer.lost,
        ).to_json()

    with hashed_files(target, (TOKENS, RECORDS), report) as (tokens, records):
        writer = ShardWriter(tokens, records, origin.dtype)
        yield writer
        writer.flush()


def damage(shard: Path) -> str:
    """What is wrong with any byte of a finished shard's files, or nothing."""
    report = read_report(shard)
    if report is None:
        return f"{with_ending(shard, REPORT)} is missing or damaged"
    if wrong := sizes_differ(shard, report):
        return wrong
    for ending, file in ((TOKENS, report.tokens), (RECORDS, report.records)):
        path = with_ending(shard, ending)
        if sha256_of(path) != file.sha256:
            return f"the bytes of {path} are not those that were written"
    return ""
