"""What a process of pretokenization does: it tokenizes a shard or a part of one, or joins the parts of one.

A large shard is tokenized in parts by several processes. Joined, its files are the same as if one had done it all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fbitrain.base.errors import UserError
from fbitrain.data.pretokenized.token_shards import (
    BAD,
    BORDERED,
    RECORDS,
    REPORT,
    TOKENS,
    ShardReport,
    map_shard,
    read_report,
    with_ending,
)
from fbitrain.data.pretokenized.token_writer import Ids, writing
from fbitrain.data.reading.documents import BadRecord, Document, Entry
from fbitrain.data.reading.records import RecordFormat, decode, read_entries
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.sources.shards import Shard
from fbitrain.data.tokenizer import UnencodableText, load_tokenizer
from fbitrain.data.tools.progress import Slot

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
    max_bad_records: int
    progress: Slot
    ahead: Shard | None  # what this process will need next

    @property
    def origin(self) -> ShardReport:
        """A report that says where the tokens come from; the rest is counted."""
        shard, format = self.shard, self.format
        return ShardReport(shard.name, shard.size, shard.path, format.kind, format.key, self.dtype)


def tokenize_part(job: Job) -> None:
    """Does the job.

    Raises UserError where the shard cannot be read, changes meanwhile or holds too many bad records, and where the
    files cannot be written.
    """
    cache = _cache(job.cache_dir, job.cache_bytes)
    with cache.open(job.shard) as opened, writing(job.target, job.origin) as writer:
        if job.ahead:
            cache.prefetch(job.ahead)
        for entry in read_entries(opened.path, job.format, part=job.part, n_parts=job.n_parts):
            if isinstance(entry, BadRecord):
                writer.lost = entry.line, entry.reason
                break
            item, ids = _decoded(entry, job)
            if isinstance(item, BadRecord):
                writer.bad[str(item.line)] = item.reason
                _require_few(writer.bad, item, job.max_bad_records)
            writer.add(_row(entry, item, len(ids)), ids)
            job.progress.add(entry.size)
        _require_unchanged(opened.n_bytes, job.shard)
    job.progress.finish()


def join_parts(parts_of: tuple[Path, Sequence[Path]]) -> None:
    """Makes (target, parts) one shard, in the order of lines, out of its finished parts, which then go.

    Raises UserError where the files cannot be written.
    """
    target, parts = parts_of
    reports = [report for part in parts if (report := read_report(part))]
    assert len(reports) == len(parts), f"a part of {target} is not finished"
    opened = [map_shard(part, report) for part, report in zip(parts, reports, strict=True)]
    records = np.concatenate([records for records, _ in opened])
    owners = np.repeat(np.arange(len(parts)), [len(records) for records, _ in opened])
    with writing(target, reports[0]) as writer:
        for i in np.argsort(records["line"], kind="stable"):
            first, n_tokens = int(records[i]["first_token"]), int(records[i]["n_tokens"])
            writer.add(records[i], opened[owners[i]][1][first : first + n_tokens])
        bad = {int(line): reason for report in reports for line, reason in report.bad.items()}
        writer.bad = {str(line): bad[line] for line in sorted(bad)}
        writer.lost = next((report.lost for report in reports if report.lost), None)
    for part in parts:
        for ending in (REPORT, TOKENS, RECORDS):
            with_ending(part, ending).unlink()


def _require_few(bad: Sized, last: BadRecord, limit: int) -> None:
    if len(bad) > limit:
        raise UserError(
            f"more than data.max_bad_records={limit} bad records in one shard, the last one in {last}; repair or "
            "remove the shard, correct the source's text_key, or raise data.max_bad_records"
        )


def _require_unchanged(size: int, shard: Shard) -> None:
    """A report with the size of the listing must not be written of a file that grew while it was read."""
    if 0 <= shard.size != size:
        raise UserError(
            f"{shard.path} has changed while it was tokenized: it had {shard.size} bytes and has {size}; run the "
            "command again when nobody writes to it"
        )


def _row(entry: Entry, item: Document | BadRecord, n_tokens: int) -> tuple[int, ...]:
    """The RECORD of what was decoded from `entry`; first_token is left to the writer."""
    assert entry.after.line == entry.at.line + 1, "the next record begins on the next line"
    place = entry.at.line, entry.at.offset, entry.after.offset, entry.size, 0, n_tokens
    if isinstance(item, BadRecord):
        return (*place, 0, 0, 0, BAD)
    return (*place, item.n_bytes, item.content_hash, item.n_replaced, BORDERED if item.bordered else 0)


def _decoded(entry: Entry, job: Job) -> tuple[Document | BadRecord, Ids]:
    """What is in `entry`, and its token ids.

    Ready-made ids that no token of this vocabulary has, and a text on which the tokenizer gives up, are a bad record,
    as in the stream.
    """
    item = decode(entry, job.format, job.shard.path)
    if isinstance(item, BadRecord):
        return item, NO_IDS
    tokenizer = _tokenizer(job.tokenizer_path)
    if not (flaw := item.flaw(tokenizer.vocab_size)):
        try:
            return item, tokenizer.encode_array(item.text) if item.token_ids is None else item.token_ids
        except UnencodableText as error:
            flaw = str(error)
    return BadRecord(job.shard.path, entry.at.line, flaw), NO_IDS


# A process does many jobs, all with the same two.
_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)
_cache = functools.lru_cache(maxsize=1)(ShardCache)
