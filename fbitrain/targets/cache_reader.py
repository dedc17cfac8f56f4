"""Reading a cache of a teacher's targets: for a batch of the stream, the targets of its tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fbitrain.base.errors import UserError
from fbitrain.data.pretokenized.token_shards import TokenIndex, size_differs, with_ending
from fbitrain.data.reading.documents import Span
from fbitrain.targets.cache_folder import (
    FRAMES,
    PLACES,
    CacheSettings,
    map_places,
    read_cached,
    read_settings,
    shard_path,
)
from fbitrain.targets.frames import FRAME_TOKENS, DamagedFrame, FrameFormat, Targets
from fbitrain.targets.sparse import SparseTargets

FRAMES_KEPT = 128  # the last ones read, some 200 KB each: a long document is read in many pieces


class _Frame(NamedTuple):
    targets: Targets
    ends: memoryview  # int32 [M + 1], read number by number: where the words of each token end, behind a 0


class TargetCache:
    """The cache in `folder`. Raises UserError where there is none.

    rest: what becomes of the probability that the likeliest words leave, of a cache of these: "renormalize" gives it to
    them, "label" to the token that follows in the text (arXiv 2503.16870).
    """

    def __init__(self, folder: str | Path, rest: str = "renormalize") -> None:
        self.folder = Path(folder)
        self.settings: CacheSettings = read_settings(self.folder)
        self._rest = rest
        self._format = FrameFormat(self.settings.vocab_size, self.settings.weight_dtype)
        self._covered: set[tuple[str, str]] = set()
        self._shards: dict[tuple[str, str], _Shard] = {}
        self._frames: OrderedDict[tuple[str, str, int, int], _Frame] = OrderedDict()

    def cover(self, index: TokenIndex, sources: Sequence[str]) -> list[str]:
        """Looks which shards of `sources` have targets, of the very tokens in `index`; returns the names of the others.

        Raises UserError for a shard whose files have other sizes than were written, or that was tokenized anew.
        """
        missing = []
        for source in sources:
            for report in index.sources.get(source, []):
                path = shard_path(self.folder, source, report.name)
                cached = read_cached(path)
                if cached is None:
                    missing.append(f"{source}/{report.name}")
                    continue
                if cached.tokens_sha256 != report.tokens.sha256:
                    raise UserError(
                        f"{path} was written for other tokens than those in {index.folder}; give the folder that it "
                        "was written for as data.pretokenized, or write the cache anew"
                    )
                for ending, file in ((FRAMES, cached.frames), (PLACES, cached.places)):
                    if wrong := size_differs(with_ending(path, ending), file):
                        raise UserError(f"{wrong}; restore it, or remove its .json and write the cache again")
                self._covered.add((source, report.name))
        return missing

    def covers(self, spans: Sequence[Span]) -> bool:
        """Whether there is a target for every token of a sequence."""
        return all((span.source, span.shard) in self._covered for span in spans)

    def read(self, sequences: Sequence[Sequence[Span]]) -> SparseTargets:
        """The targets of the tokens that `sequences` predict: of each, all but the first of its T + 1 tokens.

        The first token of a document, which no teacher predicts from the document, has its label for a target. Raises
        UserError where bytes are not those that were written.
        """
        parts: list[Targets] = []
        labelled: list[int] = []
        n_tokens = 0
        for spans in sequences:
            skip = 1
            for span in spans:
                first = span.start + skip
                skip = 0
                if first == 0 and first < span.stop:
                    labelled.append(n_tokens)
                    parts.append(self._format.no_words)
                    n_tokens, first = n_tokens + 1, 1
                if first < span.stop:
                    self._add(parts, span, first)
                    n_tokens += span.stop - first
        return self._joined(parts, labelled) if parts else SparseTargets.none(0)

    def _add(self, parts: list[Targets], span: Span, first: int) -> None:
        """The targets of the span's tokens from `first` on, frame by frame."""
        while first < span.stop:
            number, at = divmod(first - 1, FRAME_TOKENS)
            (n, ids, weights), ends = self._frame(span, number)
            to = min(at + span.stop - first, len(n))
            if to <= at:
                raise self._shard(span).damaged(span.line, "it holds fewer tokens than its document has")
            words = slice(ends[at], ends[to])
            parts.append(Targets(n[at:to], ids[words], weights[words]))
            first += to - at

    def _joined(self, parts: Sequence[Targets], labelled: Sequence[int]) -> SparseTargets:
        n, ids, weights = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        label_weights, divisor = np.zeros(len(n), np.float32), float(self.settings.n)
        if self.settings.kind == "top":
            place, divisor = np.repeat(np.arange(len(n)), n), 1.0
            sums = np.bincount(place, weights, minlength=len(n)).astype(np.float32)
            if self._rest == "label":
                label_weights = np.maximum(1 - sums, 0)
            else:
                weights = weights / sums[place]
        if labelled:
            label_weights[labelled] = 1
        ends = torch.from_numpy(n.cumsum(dtype=np.int64))
        words, shares = torch.from_numpy(ids), torch.from_numpy(weights)
        return SparseTargets(ends, words, shares, torch.from_numpy(label_weights), divisor)

    def _frame(self, span: Span, number: int) -> _Frame:
        """Frame `number` of the span's document."""
        key = span.source, span.shard, span.line, number
        found = self._frames.get(key)
        if found is not None:
            self._frames.move_to_end(key)
            return found
        targets = self._shard(span).decode(span, number)
        ends = np.zeros(len(targets.n) + 1, np.int32)
        np.cumsum(targets.n, dtype=np.int32, out=ends[1:])
        found = self._frames[key] = _Frame(targets, ends.data)
        if len(self._frames) > FRAMES_KEPT:
            self._frames.popitem(last=False)
        return found

    def _shard(self, span: Span) -> _Shard:
        key = span.source, span.shard
        if key not in self._shards:
            self._shards[key] = _Shard(shard_path(self.folder, *key), self._format)
        return self._shards[key]


class _Shard:
    """The two files of one covered shard."""

    def __init__(self, path: Path, form: FrameFormat) -> None:
        self._path, self._format = path, form
        try:
            self._places = map_places(with_ending(path, PLACES))
            frames = with_ending(path, FRAMES)
            self._bytes = np.memmap(frames, np.uint8, "r").data if frames.stat().st_size else memoryview(b"")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); restore it") from None
        self._lines = np.ascontiguousarray(self._places["line"])

    def decode(self, span: Span, number: int) -> Targets:
        """Frame `number` of the span's document. Raises UserError where it is not what was written."""
        first = int(np.searchsorted(self._lines, span.line))
        last = first + (span.length - 2) // FRAME_TOKENS
        if last >= len(self._lines) or self._lines[first] != span.line or self._lines[last] != span.line:
            raise self.damaged(span.line, "it holds fewer documents than its shard has")
        _, _, offset, size, n_tokens = self._places[first + number].item()
        try:
            return self._format.decode(self._bytes[offset : offset + size], n_tokens)
        except DamagedFrame as error:
            raise self.damaged(span.line, str(error)) from None

    def damaged(self, line: int, how: str) -> UserError:
        """The error about the targets of the document at `line`."""
        return UserError(
            f"{with_ending(self._path, FRAMES)} is damaged at the document of line {line + 1}: {how}; remove "
            f"{self._path}.json and write the cache again, which makes this shard anew"
        )
