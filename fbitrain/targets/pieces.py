"""The work of writing a cache, cut into pieces of shards, each of which is whole or not there, and joined in the end.

Where a piece begins depends on its shard alone. So a run that was killed goes on, on any number of ranks, with the
pieces that are not finished, and no document is left out or done twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import orjson

from fbitrain.base.errors import UserError
from fbitrain.base.files import write_text
from fbitrain.data.pretokenized.token_shards import ShardReport, TokenIndex, map_shard, source_folder, with_ending
from fbitrain.targets.cache_files import writing_cache
from fbitrain.targets.cache_folder import (
    FRAMES,
    PLACES,
    REPORT,
    SETTINGS,
    CachedShard,
    CacheSettings,
    read_cached,
    read_settings,
    shard_path,
)

LOCK = ".lock"
PIECE_TOKENS = 1 << 17  # what a killed process loses at most; a 7B teacher needs some 15 s for it on one GPU


@dataclass(frozen=True)
class Piece:
    """Records `first` to `stop` of a shard, whose targets are at least one token's."""

    source: str
    report: ShardReport
    first: int
    stop: int
    number: int
    of: int
    n_tokens: int  # an estimate for the progress bar: BOS and EOS are not counted

    @property
    def shard(self) -> tuple[str, str]:
        """Source and name of its shard."""
        return self.source, self.report.name

    def path(self, folder: Path) -> Path:
        """The beginning of the names of its files."""
        return with_ending(shard_path(folder, self.source, self.report.name), f".piece{self.number}of{self.of}")


def claim(folder: Path, settings: CacheSettings) -> None:
    """Makes `folder` a cache with these settings, or goes on with one. Raises UserError where it is something else."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / SETTINGS).exists():
            if any(found.name != LOCK for found in folder.iterdir()):
                raise UserError(f"{folder} holds something else; give --out a new or empty folder")
            write_text(folder / SETTINGS, orjson.dumps(asdict(settings), option=orjson.OPT_INDENT_2).decode())
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror or error}); give another --out") from None
    found = read_settings(folder)
    if found != settings:
        differing = [name for name, value in asdict(settings).items() if asdict(found)[name] != value]
        listed = ", ".join(
            f"{name} {asdict(found)[name]!r} there, {asdict(settings)[name]!r} here" for name in differing
        )
        raise UserError(f"{folder} was begun otherwise ({listed}); give the same settings, or another --out")


def cut(index: TokenIndex, sources: Sequence[str]) -> Iterator[Piece]:
    """The pieces of all shards, in their order."""
    for source in sources:
        for report in index.sources[source]:
            records, _ = map_shard(source_folder(index.folder, source) / report.name, report)
            ends = np.cumsum(records["n_tokens"])
            n_tokens = int(ends[-1]) if len(ends) else 0
            of = max(1, round(n_tokens / PIECE_TOKENS))
            borders = [0, *np.searchsorted(ends, [n_tokens * i / of for i in range(1, of)]).tolist(), len(records)]
            for number, (first, stop) in enumerate(pairwise(borders)):
                size = int(records["n_tokens"][first:stop].sum())
                yield Piece(source, report, first, stop, number, of, size)


def unfinished(folder: Path, pieces: Sequence[Piece]) -> list[Piece]:
    """Those that no earlier run has finished."""
    joined = _joined(folder, pieces)
    return [
        piece for piece in pieces if piece.shard not in joined and not _is_of(piece, read_cached(piece.path(folder)))
    ]


def is_joined(folder: Path, piece: Piece) -> bool:
    """Whether the piece's shard is there as a whole."""
    return _is_of(piece, read_cached(shard_path(folder, piece.source, piece.report.name)))


def _joined(folder: Path, pieces: Sequence[Piece]) -> set[tuple[str, str]]:
    """The shards of `pieces` that are there as a whole; each is looked at once, however many pieces it has."""
    one_of = {piece.shard: piece for piece in pieces}
    return {shard for shard, piece in one_of.items() if is_joined(folder, piece)}


def _remove(piece: Path) -> None:
    """The files of the piece whose names begin with `piece`, the report first."""
    for ending in (REPORT, FRAMES, PLACES):
        with_ending(piece, ending).unlink(missing_ok=True)


def _is_of(piece: Piece, cached: CachedShard | None) -> bool:
    return cached is not None and cached.tokens_sha256 == piece.report.tokens.sha256


def join(folder: Path, pieces: Sequence[Piece]) -> None:
    """Makes one shard of its finished pieces, which then go. Raises UserError where the files cannot be written."""
    target = shard_path(folder, pieces[0].source, pieces[0].report.name)
    paths = [piece.path(folder) for piece in pieces]
    with writing_cache(target, pieces[0].report) as files:
        for path in paths:
            report = read_cached(path)
            assert report, f"{path} is not finished"
            files.append(path, report)
    for path in paths:
        _remove(path)


def remove_leftovers(folder: Path, pieces: Sequence[Piece]) -> None:
    """Files of killed runs: half-written ones, and pieces of shards that are joined."""
    joined = _joined(folder, pieces)
    for piece in pieces:
        if piece.shard in joined:
            _remove(piece.path(folder))
    for found in folder.rglob(".*.tmp"):
        found.unlink(missing_ok=True)
