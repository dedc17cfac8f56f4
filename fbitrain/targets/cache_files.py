"""The files of one shard of a cache, or of a piece of one, while they are written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fbitrain.base.errors import UserError
from fbitrain.base.files import replacing
from fbitrain.data.pretokenized.token_shards import ShardReport, with_ending
from fbitrain.data.pretokenized.token_writer import HashedFile
from fbitrain.targets.cache_folder import FRAMES, PLACE, PLACES, REPORT, CachedShard, map_places
from fbitrain.targets.frames import Targets

COPY_BYTES = 1 << 24


class CacheFiles:
    """The report makes them count and is written last. Raises UserError where they cannot be written."""

    def __init__(self, target: Path, origin: ShardReport) -> None:
        self._target, self._origin = target, origin
        self.n_tokens = self.n_words = self.n_bytes = 0
        self._stack = ExitStack()

    def __enter__(self) -> CacheFiles:
        try:
            with_ending(self._target, REPORT).unlink(missing_ok=True)
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._frames, self._places = (self._open(ending) for ending in (FRAMES, PLACES))
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def _open(self, ending: str) -> HashedFile:
        path = self._stack.enter_context(replacing(with_ending(self._target, ending)))
        return HashedFile(self._stack.enter_context(path.open("wb")))

    def __exit__(self, *error: object) -> None:
        try:
            self._stack.__exit__(*error)  # type: ignore[arg-type]
            if error[0] is None:
                frames, places = self._frames.report(), self._places.report()
                report = CachedShard(self._origin.tokens.sha256, self.n_tokens, self.n_words, frames, places)
                with replacing(with_ending(self._target, REPORT)) as path:
                    path.write_bytes(report.to_json())
        except OSError as fault:
            raise self._unwritable(fault) from None
        if isinstance(error[1], OSError):
            raise self._unwritable(error[1]) from None

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"{self._target.parent} cannot be written to ({error.strerror or error}); mend that and run the command "
            "again: what is finished stays"
        )

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
