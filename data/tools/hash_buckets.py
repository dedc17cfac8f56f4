"""Rows of documents in bucket files on disk, and the search for copies among rows in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

# uint64 [n, 4]: two halves of a 128-bit hash, the place (places order the corpus), UTF-8 bytes of the text.
Rows = npt.NDArray[np.uint64]
HIGH, LOW, PLACE, N_BYTES = range(4)
COLUMNS = 4
ROW_BYTES = 8 * COLUMNS
N_BUCKETS = 256
HASH_BYTES = 8  # of HIGH, by which buckets may be split further


class Buckets:
    """Files to which arrays are dealt, made when they are needed. To be read when the context has closed them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._files: dict[int, BinaryIO] = {}

    def paths(self) -> list[Path]:
        """The files that hold something, in the order of the buckets."""
        return [self._path(bucket) for bucket in sorted(self._files)]

    def add(self, items: npt.NDArray[np.uint64], buckets: npt.NDArray[Any]) -> None:
        """Appends item i (a row, or a number) to file buckets[i], which is below N_BUCKETS, in their order."""
        order = np.argsort(buckets, kind="stable")
        items = items[order]
        numbers, starts = np.unique(buckets[order], return_index=True)
        for bucket, part in zip(numbers.tolist(), np.split(items, starts[1:]), strict=False):
            if bucket not in self._files:
                self._files[bucket] = self._path(bucket).open("wb")
            self._files[bucket].write(part.data)

    def __enter__(self) -> Buckets:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def _path(self, bucket: int) -> Path:
        return self._folder / f"{bucket:02x}"


def hash_byte(rows: Rows, i: int) -> npt.NDArray[np.uint8]:
    """Byte i of each row's hash, the most significant first."""
    shifted: npt.NDArray[np.uint64] = rows[:, HIGH] >> np.uint64(8 * (HASH_BYTES - 1 - i))
    return shifted.astype(np.uint8)


def read_rows(path: Path, n_rows: int) -> Iterator[Rows]:
    """The rows of a file, up to `n_rows` at a time."""
    with path.open("rb") as file:
        while len(rows := np.fromfile(file, np.uint64, n_rows * COLUMNS)):
            yield rows.reshape(-1, COLUMNS)


def copies(path: Path, n_rows: int, depth: int = 1) -> Iterator[tuple[Rows, npt.NDArray[np.uint64]]]:
    """The rows of a bucket whose hash occurs in it before them, and the place of the first row with that hash [n].

    The file holds its rows in the order of their places; it is removed. About `n_rows` are in memory at a time: a
    larger bucket is split by byte `depth` of the hash, and where nothing is left to split by, which means that one text
    is repeated that often, it is gone through with its first row in hand.
    """
    if path.stat().st_size > n_rows * ROW_BYTES and depth < HASH_BYTES:
        with Buckets(path.with_name(f"{path.name}_split")) as buckets:
            for rows in read_rows(path, n_rows):
                buckets.add(rows, hash_byte(rows, depth))
        path.unlink()
        for part in buckets.paths():
            yield from copies(part, n_rows, depth + 1)
        return
    firsts = np.empty((0, COLUMNS), np.uint64)
    for rows in read_rows(path, n_rows):
        firsts, later, first_places = _split_copies(np.concatenate([firsts, rows]))
        yield later, first_places
    path.unlink()


def _split_copies(rows: Rows) -> tuple[Rows, Rows, npt.NDArray[np.uint64]]:
    """The first row of each hash, the other rows, and for each of the others the place of its first."""
    rows = rows[np.lexsort((rows[:, PLACE], rows[:, LOW], rows[:, HIGH]))]
    is_first = np.ones(len(rows), bool)
    is_first[1:] = (rows[1:, HIGH] != rows[:-1, HIGH]) | (rows[1:, LOW] != rows[:-1, LOW])
    firsts = rows[is_first]
    first_of = np.cumsum(is_first) - 1  # for each row, which of `firsts` is its own
    return firsts, rows[~is_first], firsts[first_of[~is_first], PLACE]
