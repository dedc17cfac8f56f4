"""One progress bar for jobs in several processes, with the time that is left.

The size of a job is the size of its shard on disk. The process that does the job counts bytes of records, which are
more if the shard is compressed; how many more is learned from finished jobs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

REFRESH_SECONDS = 1.0
COMPRESSION = 3.0  # of text by zstd and gzip, about
MOST_UNFINISHED = 0.95  # of its size is what an unfinished job may count, however wrong the ratio is
COUNTED, FINISHED = 0, 1  # columns of the shared file


@dataclass(frozen=True)
class Slot:
    """One job's place in the shared file: for the process that does the job."""

    path: str
    i: int
    n: int

    def add(self, n_bytes: int) -> None:
        _shared(self.path, self.n)[self.i, COUNTED] += n_bytes

    def finish(self) -> None:
        _shared(self.path, self.n)[self.i, FINISHED] = 1


class ProgressBar:
    """Shows the slots of jobs of `sizes` bytes behind `done` bytes that were there before, until it is closed.

    `ratio` is a guess of the bytes of records per byte of shard, for as long as no job has finished.
    """

    def __init__(
        self, path: Path, sizes: Sequence[float], done: float, description: str, ratio: float = COMPRESSION
    ) -> None:
        self._path, self._sizes, self._done = path, np.array(sizes, dtype=np.float64), done
        self._first_ratio = ratio
        # Written, not left sparse: a process that touches a page for which the disk has no room is killed.
        np.zeros((max(len(sizes), 1), 2), np.int64).tofile(path)
        _shared.cache_clear()  # a bar before this one may have had a file of the same name
        self._counts = _shared(str(path), max(len(sizes), 1))
        total = int(self._sizes.sum() + done)
        self._bar = tqdm(total=total, initial=int(done), unit="B", unit_scale=True, smoothing=0, desc=description)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._refresh, daemon=True)
        self._thread.start()

    def slot(self, i: int) -> Slot:
        return Slot(str(self._path), i, len(self._counts))

    def position(self) -> float:
        """Bytes of shards done, those of unfinished jobs estimated."""
        if not len(self._sizes):
            return self._done
        counted, finished = self._counts[:, COUNTED], self._counts[:, FINISHED] > 0
        size_finished = self._sizes[finished].sum()
        ratio = max(counted[finished].sum() / size_finished, 1e-3) if size_finished else self._first_ratio
        unfinished = np.minimum(counted / ratio, self._sizes * MOST_UNFINISHED)
        return float(self._done + np.where(finished, self._sizes, unfinished).sum())

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self._show()
        self._bar.close()
        self._path.unlink(missing_ok=True)

    def _refresh(self) -> None:
        while not self._closing.wait(REFRESH_SECONDS):
            self._show()

    def _show(self) -> None:
        self._bar.n = int(self.position())
        self._bar.refresh()


@functools.lru_cache(maxsize=1)
def _shared(path: str, n: int) -> npt.NDArray[np.int64]:
    return np.memmap(path, np.int64, mode="r+", shape=(n, 2))
