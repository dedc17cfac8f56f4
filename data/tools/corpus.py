"""Reads the corpus outside of training: every document of a shard, in the order of the file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig
from fbitrain.data.reading.documents import BadRecord, Document
from fbitrain.data.reading.records import RecordFormat, decode, read_entries
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.sources.shards import Shard, find_shards

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """What a command has read of one source. Few bad records are told in the end, too many stop the command."""

    source: str
    max_bad_records: int
    documents: int = 0
    bad_records: int = 0
    last_bad: BadRecord | None = None

    def add_bad(self, bad: BadRecord) -> None:
        """Raises UserError for one more than max_bad_records."""
        self.add(Tally(self.source, self.max_bad_records, bad_records=1, last_bad=bad))

    def add(self, other: Tally) -> None:
        """Adds what another process has read of the source. Raises UserError for more than max_bad_records."""
        self.documents += other.documents
        self.bad_records += other.bad_records
        self.last_bad = other.last_bad or self.last_bad
        if self.bad_records > self.max_bad_records:
            raise UserError(
                f"source {self.source!r} has more than data.max_bad_records={self.max_bad_records} bad records, the "
                f"last one in {self.last_bad}; correct the source's text_key or ids_key, repair or remove the shard, "
                "or raise data.max_bad_records"
            )

    def close(self) -> None:
        """Logs the number of bad records and the last of them. Raises UserError if there was nothing else."""
        if not self.bad_records:
            return
        if not self.documents:
            raise UserError(
                f"source {self.source!r} gave nothing but bad records ({self.bad_records}), the last one in "
                f"{self.last_bad}; correct its text_key or ids_key, or its paths"
            )
        logger.warning(
            "source %r: bad records passed over: %d, the last one in %s", self.source, self.bad_records, self.last_bad
        )


def text_shards(data: DataConfig) -> dict[str, list[Shard]]:
    """The shards of every source, by its name, as they were before any pretokenization. Raises UserError."""
    for source in data.sources:
        if not (source.paths or source.url_lists):
            raise UserError(
                f"source {source.name!r} lists no paths; this command needs the text that data.pretokenized="
                f"{data.pretokenized} was made from"
            )
    return {source.name: find_shards(source) for source in data.sources}


def open_cache(data: DataConfig) -> ShardCache:
    return ShardCache(data.cache_dir, data.cache_bytes)


def read_documents(path: str, format: RecordFormat, display_path: str) -> Iterator[tuple[int, Document] | BadRecord]:
    """Each document of the file `path` with its line (counted from 0), and what is damaged instead of a document."""
    for entry in read_entries(path, format):
        if isinstance(entry, BadRecord):
            yield BadRecord(display_path, entry.line, entry.reason)
            continue
        item = decode(entry, format, display_path)
        yield item if isinstance(item, BadRecord) else (entry.at.line, item)
