"""The corpus read outside of training: every document of a shard, in the order in which they lie."""

from __future__ import annotations

from collections.abc import Iterator

from fbitrain.data.config import DataConfig
from fbitrain.data.errors import DataError
from fbitrain.data.reading.documents import BadRecord, Document
from fbitrain.data.reading.records import RecordFormat, decode, read_entries
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.sources.shards import Shard, find_shards


def text_shards(data: DataConfig) -> dict[str, list[Shard]]:
    """The shards of every source, by its name, as they were before any pretokenization. Raises DataError."""
    for source in data.sources:
        if not (source.paths or source.url_lists):
            raise DataError(
                f"source {source.name!r} lists no paths; this command needs the text that data.pretokenized="
                f"{data.pretokenized} was made from"
            )
    return {source.name: find_shards(source) for source in data.sources}


def open_cache(data: DataConfig) -> ShardCache:
    return ShardCache(data.cache_dir, int(data.cache_gb * 1e9))


def read_documents(path: str, format: RecordFormat, display_path: str) -> Iterator[tuple[int, Document] | BadRecord]:
    """Each document of the file `path` with its line (counted from 0), and what is damaged instead of a document."""
    for entry in read_entries(path, format):
        if isinstance(entry, BadRecord):
            yield BadRecord(display_path, entry.line, entry.reason)
            continue
        item = decode(entry, format, display_path)
        yield item if isinstance(item, BadRecord) else (entry.at.line, item)
