"""Documents as a teacher sees them: whole where its context holds them, else in windows that overlap."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `stop` of document `document`, which give the targets of tokens `first` to `stop` + 1."""

    document: int
    start: int
    stop: int
    first: int

    @property
    def n_targets(self) -> int:
        return self.stop + 1 - self.first


def windows(document: int, length: int, context: int, overlap: int) -> Iterator[Window]:
    """The windows of a document of `length` tokens: every token but the first is some window's target, and only one's.

    What begins a later window is `overlap` tokens that give no target again, so that every target but those of the
    first window has at least so many tokens before it.
    """
    first = 1
    while first < length:
        start = max(0, first - 1 - overlap)
        stop = min(start + context, length - 1)
        yield Window(document, start, stop, first)
        first = stop + 1


def batches(found: Sequence[Window], most_tokens: int) -> Iterator[list[Window]]:
    """The windows, those of like length together, in batches of one or of at most `most_tokens` tokens with padding."""
    batch: list[Window] = []
    for window in sorted(found, key=lambda window: (window.start - window.stop, window.document, window.start)):
        longest = (batch or [window])[0]
        if batch and (longest.stop - longest.start) * (len(batch) + 1) > most_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def padded(batch: Sequence[Window], documents: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    """int64 [B, T]: each window's tokens, zeros behind them, which a causal model's earlier positions do not see."""
    ids = np.zeros((len(batch), max(window.stop - window.start for window in batch)), np.int64)
    for row, window in zip(ids, batch, strict=True):
        row[: window.stop - window.start] = documents[window.document][window.start : window.stop]
    return ids
