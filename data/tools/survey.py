"""Counts documents, lengths and tokens of a source, in some of its shards or in all."""

from __future__ import annotations

import functools
import heapq
import itertools
from array import array
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.reading.documents import BadRecord, Document
from fbitrain.data.reading.records import RecordFormat
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.sources.shards import Shard
from fbitrain.data.streaming.plan import record_format
from fbitrain.data.tokenizer import Tokenizer, UnencodableText, load_tokenizer
from fbitrain.data.tools.corpus import open_cache, read_documents, text_shards
from fbitrain.data.tools.excerpt import decoded, excerpt
from fbitrain.data.tools.parallel import in_processes
from fbitrain.data.tools.progress import ProgressBar, Slot

EXCERPT_IDS = 100  # of a ready-made sequence, decoded for its excerpt


@dataclass
class Counts:
    """Sums over what was read."""

    size: int = 0  # bytes of the shards' files
    documents: int = 0
    n_bytes: int = 0  # UTF-8 bytes of the documents' texts
    bad_records: int = 0
    sampled_documents: int = 0  # tokenized
    sampled_bytes: int = 0
    sampled_tokens: int = 0  # without BOS and EOS
    foreign: int = 0  # ready-made sequences with ids beyond the vocabulary

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class FirstDocument:
    """A document from the beginning of a shard."""

    shard: str  # its name
    line: int  # counted from 0
    length: int  # UTF-8 bytes, or ready-made ids
    excerpt: str  # of the text, printable


@dataclass
class Survey:
    """One source. Estimates are in proportion to the bytes of the shards read."""

    source: SourceConfig
    shards: Sequence[Shard]
    n_borders: int = 0  # tokens put around a document
    read: Counts = field(default_factory=Counts)
    lengths: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))  # of the documents read
    first: list[FirstDocument] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)  # shard name -> bytes of the file, of those read

    def add(self, shard: Shard, result: ReadShard) -> None:
        self.read.add(result.counts)
        self.lengths = np.concatenate([self.lengths, result.lengths])
        self.first += result.first
        self.sizes[shard.name] = result.counts.size

    @property
    def is_complete(self) -> bool:
        """Every shard was read: documents and bytes are exact."""
        return len(self.sizes) == len(self.shards)

    @property
    def has_all_tokens(self) -> bool:
        """Every document of them was tokenized too."""
        return self.is_complete and self.read.sampled_documents == self.read.documents

    @property
    def is_text(self) -> bool:
        return self.source.kind == "text"

    @property
    def documents(self) -> float:
        return self.read.documents * self._scale

    @property
    def n_bytes(self) -> float:
        return self.read.n_bytes * self._scale

    @property
    def bad_records(self) -> float:
        return self.read.bad_records * self._scale

    @property
    def tokens(self) -> float:
        """With BOS and EOS, as they count in the stream."""
        if not self.is_text:
            return self.read.sampled_tokens * self._scale
        return self.n_bytes * self.tokens_per_byte + self.documents * self.n_borders

    @property
    def tokens_per_byte(self) -> float:
        """Of the text that was tokenized, without BOS and EOS; 0 of ready-made ids."""
        return self.read.sampled_tokens / self.read.sampled_bytes if self.read.sampled_bytes else 0.0

    @property
    def _scale(self) -> float:
        if self.is_complete or not self.read.size:
            return 1.0
        sizes = [self.sizes.get(shard.name, shard.size) for shard in self.shards]
        known = [size for size in sizes if size >= 0]  # the others are remote, and nobody has asked
        return sum(known) / len(known) * len(sizes) / self.read.size


@dataclass(frozen=True)
class ReadJob:
    """One shard for a worker."""

    source: str
    shard: Shard
    format: RecordFormat
    cache: ShardCache
    tokenizer_path: str
    sample_bytes: int  # of text to tokenize
    n_first: int  # documents to bring along
    progress: Slot


@dataclass(frozen=True)
class ReadShard:
    """What was in it. `lengths` are UTF-8 bytes of texts, or numbers of ready-made ids."""

    counts: Counts
    lengths: npt.NDArray[np.int64]
    first: list[FirstDocument]


def survey(
    data: DataConfig, tokenizer_path: str, *, max_shards: int, sample_bytes: int, n_first: int, n_workers: int
) -> list[Survey]:
    """Reads up to `max_shards` shards of each source, evenly spaced (0: all of them), as they lie on disk.

    Of a source's text about `sample_bytes` at most are tokenized, documents drawn by the hash of their content. Of its
    first shard `n_first` documents are brought along. Raises UserError.
    """
    all_shards = text_shards(data)
    surveys = {
        source.name: Survey(source, all_shards[source.name], data.add_bos + data.add_eos) for source in data.sources
    }
    chosen = {name: evenly_spaced(shards, max_shards) for name, shards in all_shards.items()}
    sizes = [max(shard.size, 0) for shards in chosen.values() for shard in shards]
    cache = open_cache(data)
    with TemporaryDirectory() as folder, ProgressBar(Path(folder) / "progress", sizes, 0, "reading") as bar:
        jobs: list[ReadJob] = []
        for source in data.sources:
            sample = sample_bytes // len(chosen[source.name])
            for i, shard in enumerate(chosen[source.name]):
                settings = (record_format(source), cache, tokenizer_path, sample, 0 if i else n_first)
                jobs.append(ReadJob(source.name, shard, *settings, bar.slot(len(jobs))))
        with closing(in_processes(read_shard, jobs, n_workers)) as results:
            for job, result in zip(jobs, results, strict=True):
                surveys[job.source].add(job.shard, result)
    return list(surveys.values())


def evenly_spaced(shards: Sequence[Shard], n: int) -> list[Shard]:
    """`n` of them, the first among them; all for n = 0."""
    n = min(n, len(shards)) or len(shards)
    return [shards[i * len(shards) // n] for i in range(n)]


def read_shard(job: ReadJob) -> ReadShard:
    """Counts one shard. Raises UserError where it cannot be opened."""
    tokenizer = _tokenizer(job.tokenizer_path)
    counts, lengths, sample = Counts(), array("q"), Sample(job.sample_bytes)
    first: list[FirstDocument] = []
    with job.cache.open(job.shard) as opened:
        for item in read_documents(opened.path, job.format, job.shard.path):
            if isinstance(item, BadRecord):
                counts.bad_records += 1
                continue
            line, document = item
            counts.documents += 1
            counts.n_bytes += document.n_bytes
            job.progress.add(document.n_bytes)
            lengths.append(_length(document))
            if len(first) < job.n_first:
                first.append(FirstDocument(job.shard.name, line, _length(document), _excerpt(document, tokenizer)))
            if document.token_ids is None:
                sample.add(document)
            else:
                counts.sampled_documents += 1
                counts.sampled_tokens += len(document.token_ids)
                counts.foreign += bool((document.token_ids >= tokenizer.vocab_size).any())
        counts.size = opened.n_bytes
    for document in sample.documents():
        try:
            n_tokens = len(tokenizer.encode_array(document.text))
        except UnencodableText:
            counts.bad_records += 1
            continue
        counts.sampled_documents += 1
        counts.sampled_bytes += document.n_bytes
        counts.sampled_tokens += n_tokens
    job.progress.finish()
    return ReadShard(counts, np.array(lengths, np.int64), first)


class Sample:
    """Documents of at most `n_bytes` in all (but one at least), drawn by the smallest hashes of their content."""

    def __init__(self, n_bytes: int) -> None:
        self._left = n_bytes
        self._numbers = itertools.count()  # decide between copies
        self._largest_first: list[tuple[int, int, Document]] = []

    def add(self, document: Document) -> None:
        self._left -= document.n_bytes
        heapq.heappush(self._largest_first, (-document.content_hash, next(self._numbers), document))
        while self._left < 0 and len(self._largest_first) > 1:
            self._left += heapq.heappop(self._largest_first)[2].n_bytes

    def documents(self) -> list[Document]:
        return [document for _, _, document in self._largest_first]


def _length(document: Document) -> int:
    return document.n_bytes if document.token_ids is None else len(document.token_ids)


def _excerpt(document: Document, tokenizer: Tokenizer) -> str:
    if document.token_ids is None:
        return excerpt(document.text)
    return excerpt(decoded(document.token_ids[:EXCERPT_IDS].tolist(), tokenizer))


_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)
