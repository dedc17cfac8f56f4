"""The files of one shard of a cache, or of a piece of one, while they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fbitrain.data.pretokenized.token_shards import ShardReport, with_ending
from fbitrain.data.pretokenized.token_writer import HashedFile, hashed_files
from fbitrain.targets.cache_folder import FRAMES, PLACE, PLACES, CachedShard, map_places
from fbitrain.targets.frames import Targets

COPY_BYTES = 1 << 24


@contextmanager
def writing_cache(target: Path, origin: ShardReport) -> Iterator[CacheFiles]:
    """Yields the files of `target`, made for the tokens of `origin`; their report, written last, makes them count.

    Raises UserError where they cannot be written.
    """

    def report() -> bytes:
        sha256 = origin.tokens.sha256
        return CachedShard(sha256, files.n_tokens, files.n_words, frames.report(), places.report()).to_json()

    with hashed_files(target, (FRAMES, PLACES), report) as (frames, places):
        files = CacheFiles(frames, places)
        yield files


class CacheFiles:
    """Appends frames and their places to two files, and counts."""

    def __init__(self, frames: HashedFile, places: HashedFile) -> None:
        self._frames, self._places = frames, places
        self.n_tokens = self.n_words = self.n_bytes = 0

    def add(self, line: int, first: int, targets: Targets, frame: bytes) -> None:
        place = np.array([(line, first, self._frames.size, len(frame), len(targets.n))], PLACE)
        self._frames.write(frame)
        self._places.write(place.tobytes())
        self._count(len(targets.n), len(targets.ids), len(frame) + PLACE.itemsize)

    def append(self, path: Path, report: CachedShard) -> None:
        """Everything of a finished piece."""
        places = map_places(with_ending(path, PLACES))
        places["offset"] += self._frames.size
        self._places.write(places.tobytes())
        with with_ending(path, FRAMES).open("rb") as file:
            while chunk := file.read(COPY_BYTES):
                self._frames.write(chunk)
        self._count(report.n_tokens, report.n_words, report.frames.size + report.places.size)

    def _count(self, n_tokens: int, n_words: int, n_bytes: int) -> None:
        self.n_tokens += n_tokens
        self.n_words += n_words
        self.n_bytes += n_bytes
