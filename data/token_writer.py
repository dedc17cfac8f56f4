"""Writes one pretokenized shard, or a part of one; joins parts. The format is in fbitrain.data.token_shards.

A large shard is tokenized in parts by several processes. Joined, its files are the same as if one had done it all.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from fbitrain.data.cache import ShardCache
from fbitrain.data.documents import BadRecord, Document, Entry
from fbitrain.data.files import replacing
from fbitrain.data.progress import Slot
from fbitrain.data.records import RecordFormat, decode, read_entries
from fbitrain.data.shards import DataError, Shard
from fbitrain.data.token_shards import (
    BAD,
    BORDERED,
    RECORD,
    RECORDS,
    REPORT,
    TOKENS,
    FileReport,
    Records,
    ShardReport,
    map_shard,
    read_report,
    sizes_differ,
    with_ending,
)
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer

BATCH_RECORDS = 4096  # written at a time
HASH_BYTES = 1 << 24  # read at a time

Ids = npt.NDArray[Any]
NO_IDS: Ids = np.empty(0, np.uint16)


@dataclass(frozen=True)
class Job:
    """Lines `part`, `part + n_parts`, … of `shard`, to become the files that begin with `target`."""

    shard: Shard
    format: RecordFormat
    part: int
    n_parts: int
    target: Path
    dtype: str  # of the ids
    tokenizer_path: str
    cache_dir: str
    cache_bytes: int
    progress: Slot
    ahead: Shard | None  # what this process will need next

    @property
    def origin(self) -> ShardReport:
        """A report that says where the tokens come from; the rest is counted."""
        shard, format = self.shard, self.format
        return ShardReport(shard.name, shard.size, shard.path, format.kind, format.key, self.dtype)


def tokenize_part(job: Job) -> None:
    """Does the job. Raises DataError where the shard cannot be read, or the files not written."""
    cache = _cache(job.cache_dir, job.cache_bytes)
    with cache.open(job.shard) as opened, _writing(job.target, job.origin) as writer:
        if job.ahead:
            cache.prefetch(job.ahead)
        for entry in _entries(opened.path, job):
            if isinstance(entry, BadRecord):
                writer.lost = entry.line, entry.reason
                break
            item = decode(entry, job.format, job.shard.path)
            if isinstance(item, BadRecord):
                writer.bad[str(item.line)] = item.reason
                ids: Ids = NO_IDS
            else:
                ids = _ids(item, job, entry.at.line)
            writer.add(_row(entry, item, len(ids)), ids)
            job.progress.add(entry.size)
    job.progress.finish()


def join_parts(parts_of: tuple[Path, Sequence[Path]]) -> None:
    """Makes (target, parts) one shard, in the order of lines, out of its finished parts, which then go.

    Raises DataError where the files cannot be written.
    """
    target, parts = parts_of
    reports = [report for part in parts if (report := read_report(part))]
    assert len(reports) == len(parts), f"a part of {target} is not finished"
    opened = [map_shard(part, report) for part, report in zip(parts, reports, strict=True)]
    records = np.concatenate([records for records, _ in opened])
    owners = np.repeat(np.arange(len(parts)), [len(records) for records, _ in opened])
    with _writing(target, reports[0]) as writer:
        for i in np.argsort(records["line"], kind="stable"):
            first, n_tokens = int(records[i]["first_token"]), int(records[i]["n_tokens"])
            writer.add(records[i], opened[owners[i]][1][first : first + n_tokens])
        bad = {int(line): reason for report in reports for line, reason in report.bad.items()}
        writer.bad = {str(line): bad[line] for line in sorted(bad)}
        writer.lost = next((report.lost for report in reports if report.lost), None)
    for part in parts:
        for ending in (REPORT, TOKENS, RECORDS):
            with_ending(part, ending).unlink()


def damage(shard: Path) -> str:
    """What is wrong with any byte of a finished shard's files, or nothing."""
    report = read_report(shard)
    if report is None:
        return f"{with_ending(shard, REPORT)} is missing or damaged"
    if wrong := sizes_differ(shard, report):
        return wrong
    for ending, file in ((TOKENS, report.tokens), (RECORDS, report.records)):
        path = with_ending(shard, ending)
        if _sha256(path) != file.sha256:
            return f"the bytes of {path} are not those that were written"
    return ""


class _Writer:
    """Appends records and their tokens to two files, and counts."""

    def __init__(self, tokens: _HashedFile, records: _HashedFile, dtype: str) -> None:
        self._tokens, self._records = tokens, records
        self._dtype = np.dtype(dtype)
        self._rows: Records = np.zeros(BATCH_RECORDS, RECORD)
        self._ids: list[Ids] = []
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
        if i + 1 == BATCH_RECORDS:
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
        self._ids = []


class _HashedFile:
    """A file that is written once, with the hash of what it holds."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def report(self) -> FileReport:
        return FileReport(self._size, self._digest.hexdigest())


@contextmanager
def _writing(target: Path, origin: ShardReport) -> Iterator[_Writer]:
    """Yields a writer of the files of `target`; what it has counted becomes their report, written last.

    `origin` says what the tokens are made of. Raises DataError where a file cannot be written.
    """
    try:
        with_ending(target, REPORT).unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            replacing(with_ending(target, TOKENS)) as tokens_path,
            replacing(with_ending(target, RECORDS)) as records_path,
            tokens_path.open("wb") as tokens_file,
            records_path.open("wb") as records_file,
        ):
            tokens, records = _HashedFile(tokens_file), _HashedFile(records_file)
            writer = _Writer(tokens, records, origin.dtype)
            yield writer
            writer.flush()
        report = replace(
            origin,
            tokens=tokens.report(),
            records=records.report(),
            n_records=writer.n_records,
            n_documents=writer.n_documents,
            n_tokens=writer.n_tokens,
            n_bytes=writer.n_bytes,
            bad=writer.bad,
            lost=writer.lost,
        )
        with replacing(with_ending(target, REPORT)) as path:
            path.write_bytes(report.to_json())
    except OSError as error:
        raise DataError(
            f"{target.parent} cannot be written to ({error.strerror or error}); mend that and run the command again: "
            "what is finished stays"
        ) from None


def _entries(path: str, job: Job) -> Iterator[Entry | BadRecord]:
    """The records of the job. Raises DataError where the file cannot be opened or read at all."""
    try:
        yield from read_entries(path, job.format, part=job.part, n_parts=job.n_parts)
    except OSError as error:
        raise DataError(f"{job.shard.path} cannot be read ({error.strerror or error}); restore it") from None


def _row(entry: Entry, item: Document | BadRecord, n_tokens: int) -> tuple[int, ...]:
    """The RECORD of what was decoded from `entry`; first_token is left to the writer."""
    assert entry.after.line == entry.at.line + 1, "the next record begins on the next line"
    place = entry.at.line, entry.at.offset, entry.after.offset, entry.size, 0, n_tokens
    if isinstance(item, BadRecord):
        return (*place, 0, 0, 0, BAD)
    return (*place, item.n_bytes, item.content_hash, item.n_replaced, BORDERED if item.bordered else 0)


def _ids(document: Document, job: Job, line: int) -> Ids:
    """The document's tokens. Raises DataError for ready-made ids that no token of this vocabulary has."""
    if document.token_ids is None:
        return _tokenizer(job.tokenizer_path).encode_array(document.text)
    largest = int(document.token_ids.max(initial=0))
    if largest > np.iinfo(job.dtype).max:
        raise DataError(
            f"{job.shard.path}, line {line + 1}: token id {largest} is not in the vocabulary of {job.tokenizer_path}; "
            "give the tokenizer that the ids were made with"
        )
    return document.token_ids


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(HASH_BYTES):
            digest.update(data)
    return digest.hexdigest()


# A process does many jobs, all with the same two.


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


@functools.lru_cache(maxsize=1)
def _cache(folder: str, max_bytes: int) -> ShardCache:
    return ShardCache(folder, max_bytes)
