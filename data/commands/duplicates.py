"""Finds the documents whose text occurs before them in the corpus, in bounded memory, whatever the corpus's size.

Every document becomes a row of 32 bytes: 128 bits of hash, place, size. Rows are dealt to bucket files on disk by
their hash, so that all copies of a text meet in one bucket, and each bucket is sorted in memory. What is found is dealt
once more, by shard, and written.

Two different texts share a 128-bit hash with a probability of about n²/2**129: of a trillion tokens (n = 10**9
documents) the chance that even one document is taken for a copy wrongly is 1.5e-21. The stream's own 64-bit hash would
be wrong 0.03 times on average.
"""

from __future__ import annotations

import argparse
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from fbitrain.base.command import config_parser, positive
from fbitrain.base.errors import UserError
from fbitrain.base.files import naming_unwritable, require_writable, scratch_folder
from fbitrain.data.config import DataConfig
from fbitrain.data.config_file import read_data_config
from fbitrain.data.duplicate_list import write_duplicates
from fbitrain.data.reading.documents import BadRecord
from fbitrain.data.reading.records import RecordFormat
from fbitrain.data.sources.cache import OpenShard, ShardCache
from fbitrain.data.sources.shards import Shard
from fbitrain.data.streaming.plan import record_format
from fbitrain.data.tools.corpus import Tally, open_cache, read_documents, text_shards
from fbitrain.data.tools.hash_buckets import N_BUCKETS, N_BYTES, PLACE, ROW_BYTES, Buckets, copies, hash_byte, read_rows
from fbitrain.data.tools.parallel import in_processes, n_cpus
from fbitrain.data.tools.progress import ProgressBar, Slot
from fbitrain.data.tools.tables import human_bytes, table

DIGEST_BYTES = 16
LINE_BITS = 40  # of a place; the bits above are the shard's number: 2**24 shards of 2**40 lines
PLACE_AND_SIZE = struct.Struct("=QQ")
WRITE_BYTES = 1 << 20
# Measured: 114 bytes to find the copies in a bucket; the rest is for counting and dealing them.
MEMORY_PER_ROW = 160


@dataclass
class SourceCounts:
    """What was found in one source."""

    documents: int = 0
    n_bytes: int = 0  # UTF-8 bytes of their texts
    bad_records: int = 0
    within: int = 0  # duplicates whose first copy is in the same source
    across: int = 0  # duplicates whose first copy is in a source before it
    duplicate_bytes: int = 0


@dataclass(frozen=True)
class HashJob:
    """One shard for a worker."""

    number: int  # of the shard, in the order (source, shard name)
    source: str
    shard: Shard
    format: RecordFormat
    cache: ShardCache
    max_bad_records: int
    rows: Path  # where to write them
    progress: Slot


@dataclass(frozen=True)
class HashedShard:
    """What a worker counted."""

    tally: Tally
    n_bytes: int  # UTF-8 bytes of the documents' texts
    size: int  # bytes of the shard's file


def find_duplicates(data: DataConfig, out: Path, memory_mb: int, n_workers: int) -> dict[str, SourceCounts]:
    """Writes the list of all documents but the first of each text to `out`, and says what was found per source.

    First means in the order of the sources, then of shard names, then of lines. Sorting takes about `memory_mb` (and a
    worker what one document takes), and there are 40 bytes per document on disk beside `out` while it runs. A run that
    is killed leaves nothing but these, and the next one clears them away. Raises UserError, also for a source of more
    than data.max_bad_records bad records, or of nothing else.
    """
    sources = text_shards(data)
    counts = {source.name: SourceCounts() for source in data.sources}
    with naming_unwritable(out), scratch_folder(out.absolute().with_name(f".{out.name}.tmp")) as scratch:
        sizes = [max(shard.size, 0) for shards in sources.values() for shard in shards]
        with Buckets(scratch / "hashes") as hashes, ProgressBar(scratch / "progress", sizes, 0, "hashing") as bar:
            jobs = _jobs(data, sources, scratch, bar)
            hashed = _hash_corpus(jobs, n_workers, hashes, counts)
        with Buckets(scratch / "found") as found:
            _find_copies(hashes.paths(), int(memory_mb * 1e6 / MEMORY_PER_ROW), jobs, found, counts)
        write_duplicates(out, hashed, _lines_by_shard(found.paths(), jobs))
    return counts


def _jobs(data: DataConfig, sources: dict[str, list[Shard]], scratch: Path, bar: ProgressBar) -> list[HashJob]:
    cache = open_cache(data)
    shards = [(source, shard) for source in data.sources for shard in sources[source.name]]
    return [
        HashJob(
            number=number,
            source=source.name,
            shard=shard,
            format=record_format(source),
            cache=cache,
            max_bad_records=data.max_bad_records,
            rows=scratch / f"rows_{number}",
            progress=bar.slot(number),
        )
        for number, (source, shard) in enumerate(shards)
    ]


def hash_shard(job: HashJob) -> HashedShard:
    """Writes a row for every document of a shard. Raises UserError where that fails."""
    try:
        with job.cache.open(job.shard) as opened, open(job.rows, "wb") as out:
            hashed = _write_rows(job, opened, out)
    except OSError as error:
        raise UserError(f"{job.shard.path} cannot be hashed ({error}); restore it, or make room beside --out") from None
    job.progress.finish()
    return hashed


def _write_rows(job: HashJob, opened: OpenShard, out: BinaryIO) -> HashedShard:
    tally = Tally(job.source, job.max_bad_records)
    n_bytes = n_reported = 0
    rows = bytearray()
    for item in read_documents(opened.path, job.format, job.shard.path):
        if isinstance(item, BadRecord):
            tally.add_bad(item)
            continue
        line, document = item
        rows += document.content_digest(DIGEST_BYTES)
        rows += PLACE_AND_SIZE.pack(job.number << LINE_BITS | line, document.n_bytes)
        tally.documents += 1
        n_bytes += document.n_bytes
        if len(rows) >= WRITE_BYTES:
            out.write(rows)
            rows.clear()
            job.progress.add(n_bytes - n_reported)
            n_reported = n_bytes
    out.write(rows)
    return HashedShard(tally, n_bytes, opened.n_bytes)


def _hash_corpus(
    jobs: Sequence[HashJob], n_workers: int, buckets: Buckets, counts: dict[str, SourceCounts]
) -> dict[str, list[Shard]]:
    """Deals the rows of all shards to `buckets`, in the order of their places. The shards with their measured sizes.

    Raises UserError for a source of too many bad records, or of nothing else.
    """
    hashed: dict[str, list[Shard]] = {source: [] for source in counts}
    tallies: dict[str, Tally] = {}
    with closing(in_processes(hash_shard, jobs, n_workers)) as results:
        for job, result in zip(jobs, results, strict=True):
            for rows in read_rows(job.rows, WRITE_BYTES // ROW_BYTES):
                buckets.add(rows, hash_byte(rows, 0))
            job.rows.unlink()
            tallies.setdefault(job.source, Tally(job.source, job.max_bad_records)).add(result.tally)
            counts[job.source].n_bytes += result.n_bytes
            hashed[job.source].append(replace(job.shard, size=result.size))
    for source, tally in tallies.items():
        tally.close()
        counts[source].documents, counts[source].bad_records = tally.documents, tally.bad_records
    return hashed


def _find_copies(
    paths: Sequence[Path], n_rows: int, jobs: Sequence[HashJob], found: Buckets, counts: dict[str, SourceCounts]
) -> None:
    """Deals the places of all copies to `found`, by shard, and counts them."""
    names = list(counts)
    source_of = np.array([names.index(job.source) for job in jobs])
    for path in tqdm(paths, unit="bucket", desc="sorting"):
        for rows, first_places in copies(path, n_rows):
            shards = (rows[:, PLACE] >> np.uint64(LINE_BITS)).astype(np.int64)
            sources = source_of[shards]
            is_within = sources == source_of[(first_places >> np.uint64(LINE_BITS)).astype(np.int64)]
            for i, of_source in enumerate(counts.values()):
                of_source.within += int(np.count_nonzero(is_within & (sources == i)))
                of_source.across += int(np.count_nonzero(~is_within & (sources == i)))
                of_source.duplicate_bytes += int(rows[sources == i, N_BYTES].sum())
            found.add(rows[:, PLACE], _group(shards, len(jobs)))


def _group(shards: npt.NDArray[np.int64], n_shards: int) -> npt.NDArray[np.int64]:
    """Which bucket holds a shard's lines: runs of consecutive shards, as many as there are buckets."""
    return shards * N_BUCKETS // n_shards


def _lines_by_shard(paths: Sequence[Path], jobs: Sequence[HashJob]) -> Iterator[tuple[str, str, npt.NDArray[Any]]]:
    """(source, shard name, sorted lines) of every shard that has duplicates, in the order of the shards."""
    for path in paths:
        places = np.sort(np.fromfile(path, np.uint64))
        numbers, starts = np.unique(places >> np.uint64(LINE_BITS), return_index=True)
        for number, lines in zip(numbers.tolist(), np.split(places, starts[1:]), strict=False):
            yield jobs[number].source, jobs[number].shard.name, lines & np.uint64((1 << LINE_BITS) - 1)


def report(counts: dict[str, SourceCounts]) -> str:
    """A table of what was found, one line per source and one for all."""
    rows = [[name, *_cells(of_source)] for name, of_source in counts.items()]
    total = SourceCounts(*(sum(values) for values in zip(*map(astuple, counts.values()), strict=True)))
    header = ("source", "documents", "text", "bad", "copies within", "copies across", "text in copies", "share")
    return table(header, [*rows, ["all", *_cells(total)]])


def _cells(counts: SourceCounts) -> list[str]:
    numbers = [f"{n:,}" for n in (counts.bad_records, counts.within, counts.across)]
    share = (counts.within + counts.across) / max(counts.documents, 1)
    text, in_copies = human_bytes(counts.n_bytes), human_bytes(counts.duplicate_bytes)
    return [f"{counts.documents:,}", text, *numbers, in_copies, f"{share:.2%}"]


def parser() -> argparse.ArgumentParser:
    found = config_parser(
        "fbitrain data duplicates", "Lists the documents whose text occurs before them in the corpus."
    )
    found.add_argument("--out", type=Path, required=True, help="the .npz file to write, for data.duplicates")
    found.add_argument("--memory-mb", type=positive, default=512, help="memory for sorting; 512 does for any corpus")
    found.add_argument("--workers", type=positive, default=n_cpus(), help="processes that read shards")
    return found


def main(options: argparse.Namespace) -> None:
    if options.out.suffix != ".npz":
        raise UserError(f"--out {options.out} must end in .npz")
    require_writable(options.out, "--out")
    data, _ = read_data_config(options.config, options.overrides)
    counts = find_duplicates(data, options.out, options.memory_mb, options.workers)
    print(report(counts))
    print(f"wrote {options.out}; training leaves the copies out with data.duplicates={options.out}")
