"""Gathers documents that `data.heldout_fraction` keeps out of training into one shard, for `data.heldout`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import zstandard
from tqdm import tqdm

from fbitrain.base.command import config_parser, positive
from fbitrain.base.errors import UserError
from fbitrain.base.files import require_writable, write_anywhere
from fbitrain.data.config import DataConfig
from fbitrain.data.config_file import read_data_config
from fbitrain.data.holdout_rule import is_heldout
from fbitrain.data.reading.documents import BadRecord
from fbitrain.data.reading.records import RecordFormat
from fbitrain.data.sources.shards import Shard
from fbitrain.data.streaming.plan import record_format, shuffle_key
from fbitrain.data.tools.corpus import Tally, open_cache, read_documents, text_shards
from fbitrain.data.tools.tables import human_bytes, table

SPREAD = 32  # shards per source that share its part evenly; more are read only if these hold too few documents
SUFFIX = ".jsonl.zst"


@dataclass(frozen=True)
class HeldoutDocument:
    """A document and where it was found first."""

    text: str
    content_hash: int
    n_bytes: int  # UTF-8
    source: str
    shard: str  # its name in the source
    line: int  # counted from 0


@dataclass
class Limit:
    """How much is still wanted."""

    documents: int
    n_bytes: float

    @property
    def reached(self) -> bool:
        return self.documents <= 0 or self.n_bytes <= 0

    def part(self, share: float) -> Limit:
        """That share of what is wanted: at least one document, if one is."""
        return Limit(math.ceil(self.documents * share), self.n_bytes * share)

    def take(self, documents: Iterable[HeldoutDocument]) -> None:
        for document in documents:
            self.documents -= 1
            self.n_bytes -= document.n_bytes


class Gatherer:
    """Reads shards until it has enough; every text once."""

    def __init__(self, data: DataConfig, bar: tqdm[Any]) -> None:
        self._cache, self._bar = open_cache(data), bar
        self._seed, self._fraction, self._max_bad_records = data.seed, data.heldout_fraction, data.max_bad_records
        self._seen: set[int] = set()

    def from_source(
        self, source: str, format: RecordFormat, shards: Sequence[Shard], limit: Limit
    ) -> list[HeldoutDocument]:
        """Documents up to `limit`, about as many from each of SPREAD shards drawn by the seed.

        Raises UserError for a source of too many bad records, or of nothing else.
        """
        drawn = sorted(shards, key=lambda shard: shuffle_key(self._seed, "holdout", source, shard.name))
        found: list[HeldoutDocument] = []
        tally = Tally(source, self._max_bad_records)
        for i, shard in enumerate(drawn):
            if limit.reached:
                break
            of_shard = self._from_shard(tally, format, shard, limit.part(1 / max(1, min(len(drawn), SPREAD) - i)))
            limit.take(of_shard)
            found += of_shard
        tally.close()
        return found

    def _from_shard(self, tally: Tally, format: RecordFormat, shard: Shard, limit: Limit) -> list[HeldoutDocument]:
        found: list[HeldoutDocument] = []
        source = tally.source
        self._bar.set_description(f"{source}/{shard.name}")
        with self._cache.open(shard) as opened:
            for item in read_documents(opened.path, format, shard.path):
                if isinstance(item, BadRecord):
                    tally.add_bad(item)
                    continue
                line, document = item
                tally.documents += 1
                content_hash = document.content_hash
                if not is_heldout(content_hash, self._seed, self._fraction) or content_hash in self._seen:
                    continue
                self._seen.add(content_hash)
                found.append(HeldoutDocument(document.text, content_hash, document.n_bytes, source, shard.name, line))
                limit.take(found[-1:])
                self._bar.update()
                if limit.reached:
                    break
        return found


def gather_heldout(data: DataConfig, max_documents: int, max_bytes: int) -> list[HeldoutDocument]:
    """Held-out documents of the sources of text, shared out by their weights; reads no more than it needs.

    A source that has too few leaves its part to those behind it. The last document of a shard's part may exceed the
    bytes. The texts are in memory, in an order that mixes the sources. Raises UserError if there are none,
    and for a source of too many bad records, or of nothing else.
    """
    if not data.heldout_fraction:
        raise UserError("data.heldout_fraction is 0, so no document is held out; set it, e.g. to 0.001")
    shards = text_shards(data)
    sources = [source for source in data.sources if source.kind == "text"]
    limit, found = Limit(max_documents, max_bytes), list[HeldoutDocument]()
    with tqdm(total=max_documents, unit="document") as bar:
        gatherer = Gatherer(data, bar)
        for i, source in enumerate(sources):
            share = source.weight / sum(other.weight for other in sources[i:])
            of_source = limit.part(share)
            documents = gatherer.from_source(source.name, record_format(source), shards[source.name], of_source)
            limit.take(documents)
            found += documents
    if not found:
        raise UserError(
            f"no document of the sources is held out by data.heldout_fraction={data.heldout_fraction}; raise it"
        )
    # In random order: an evaluation that reads only the beginning still sees every source.
    return sorted(found, key=lambda document: shuffle_key(data.seed, "heldout", document.content_hash))


def write_heldout(documents: Sequence[HeldoutDocument], out: Path) -> None:
    """Writes one record per document, at once or not at all; its meta says where it lies in the corpus."""
    lines = [
        orjson.dumps({"text": found.text, "meta": {"source": found.source, "shard": found.shard, "line": found.line}})
        for found in documents
    ]
    write_anywhere(out, zstandard.ZstdCompressor(write_checksum=True).compress(b"\n".join([*lines, b""])))


def report(documents: Sequence[HeldoutDocument]) -> str:
    """A table of how much each source gave."""
    rows = []
    for name in sorted({document.source for document in documents}):
        of_source = [document for document in documents if document.source == name]
        n_shards = len({document.shard for document in of_source})
        n_bytes = sum(document.n_bytes for document in of_source)
        rows.append([name, f"{len(of_source):,}", human_bytes(n_bytes), str(n_shards)])
    return table(("source", "documents", "text", "shards"), rows)


def parser() -> argparse.ArgumentParser:
    found = config_parser(
        "fbitrain data holdout", "Gathers documents that data.heldout_fraction keeps out of training."
    )
    found.add_argument("--out", type=Path, required=True, help=f"the {SUFFIX} file to write, for data.heldout")
    found.add_argument("--max-documents", type=positive, default=2000, help="stop at this many (default 2000)")
    found.add_argument("--max-mb", type=positive, default=16, help="or at this much text (default 16)")
    return found


def main(options: argparse.Namespace) -> None:
    if not options.out.name.endswith(SUFFIX):
        raise UserError(f"--out {options.out} must end in {SUFFIX}")
    require_writable(options.out, "--out", makes_folders=True)
    data, _ = read_data_config(options.config, options.overrides)
    documents = gather_heldout(data, options.max_documents, options.max_mb * 1_000_000)
    write_heldout(documents, options.out)
    print(report(documents))
    print(
        f"wrote {options.out}: measure it with data.heldout=[{options.out}], and keep "
        f"data.heldout_fraction={data.heldout_fraction} and data.seed={data.seed}, or training will see these documents"
    )
