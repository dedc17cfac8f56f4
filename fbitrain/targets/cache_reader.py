"""Reading a cache of a teacher's targets: for a batch of the stream, the targets of its tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
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
from fbitrain.targets.frames import FRAME_TOKENS, SMALL_VOCAB, DamagedFrame, Targets, decode
from fbitrain.targets.sparse import SparseTargets

FRAMES_KEPT = 128  # the last ones read, some 300 KB each: a long document is read in many pieces


class _Frame(NamedTuple):
    targets: Targets
    ends: npt.NDArray[np.int64]  # [M + 1] where the words of each token end, behind a 0


class TargetCache:
    """The cache in `folder`. Raises UserError where there is none.

    rest: what becomes of the probability that the likeliest words leave, of a cache of these: "renormalize" gives it to
    them, "label" to the token that follows in the text (arXiv 2503.16870).
    """

    def __init__(self, folder: str | Path, rest: str = "renormalize") -> None:
        self.folder = Path(folder)
        self.settings: CacheSettings = read_settings(self.folder)
        self._rest = rest
        ids = np.uint16 if self.settings.vocab_size <= SMALL_VOCAB else np.uint32
        self._no_words = Targets(np.zeros(1, np.uint8), np.empty(0, ids), np.empty(0, self.settings.weight_dtype))
        self._covered: set[tuple[str, str]] = set()
        self._shards: dict[tuple[str, str], _Shard] = {}
        self._frames: OrderedDict[tuple[str, str, int], _Frame] = OrderedDict()

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
                    parts.append(self._no_words)
                    n_tokens, first = n_tokens + 1, 1
                if first < span.stop:
                    parts += self._pieces(span, first, span.stop)
                    n_tokens += span.stop - first
        return self._joined(parts, labelled) if parts else SparseTargets.none(0)

    def _pieces(self, span: Span, first: int, stop: int) -> Iterator[Targets]:
        """The targets of tokens `first` to `stop` of the span's document, frame by frame."""
        shard = self._shard(span)
        frame = shard.first_frame(span)
        while first < stop:
            number = frame + (first - 1) // FRAME_TOKENS
            (n, ids, weights), ends = self._frame(shard, number)
            at = (first - 1) % FRAME_TOKENS
            to = min(at + stop - first, len(n))
            if to <= at:
                raise shard.damaged(span.line, "it holds fewer tokens than its document has")
            yield Targets(n[at:to], ids[ends[at] : ends[to]], weights[ends[at] : ends[to]])
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
        label_weights[labelled] = 1
        ends = torch.from_numpy(np.cumsum(n, dtype=np.int64))
        words, shares = torch.from_numpy(ids), torch.from_numpy(weights)
        return SparseTargets(ends, words, shares, torch.from_numpy(label_weights), divisor)

    def _frame(self, shard: _Shard, number: int) -> _Frame:
        key = (*shard.key, number)
        if key in self._frames:
            self._frames.move_to_end(key)
            return self._frames[key]
        targets = shard.decode(number)
        ends = np.zeros(len(targets.n) + 1, np.int64)
        np.cumsum(targets.n, out=ends[1:])
        found = self._frames[key] = _Frame(targets, ends)
        if len(self._frames) > FRAMES_KEPT:
            self._frames.popitem(last=False)
        return found

    def _shard(self, span: Span) -> _Shard:
        key = span.source, span.shard
        if key not in self._shards:
            self._shards[key] = _Shard(shard_path(self.folder, *key), key, self.settings)
        return self._shards[key]


class _Shard:
    """The two files of one covered shard."""

    def __init__(self, path: Path, key: tuple[str, str], settings: CacheSettings) -> None:
        self.key = key
        self._path, self._settings = path, settings
        try:
            self._places = map_places(with_ending(path, PLACES))
            frames = with_ending(path, FRAMES)
            self._bytes = np.memmap(frames, np.uint8, "r").data if frames.stat().st_size else memoryview(b"")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); restore it") from None
        self._lines = np.ascontiguousarray(self._places["line"])

    def first_frame(self, span: Span) -> int:
        """The number of the first frame of the span's document."""
        number = int(np.searchsorted(self._lines, span.line))
        last = number + (span.length - 2) // FRAME_TOKENS
        if last >= len(self._lines) or self._lines[number] != span.line or self._lines[last] != span.line:
            raise self.damaged(span.line, "it holds fewer documents than its shard has")
        return number

    def decode(self, number: int) -> Targets:
        """Raises UserError for a frame that is not what was written."""
        _, _, offset, size, n_tokens = self._places[number].item()
        settings = self._settings
        try:
            return decode(self._bytes[offset : offset + size], n_tokens, settings.vocab_size, settings.weight_dtype)
        except DamagedFrame as error:
            raise self.damaged(int(self._lines[number]), str(error)) from None

    def damaged(self, line: int, how: str) -> UserError:
        """The error about the targets of the document at `line`."""
        return UserError(
            f"{with_ending(self._path, FRAMES)} is damaged at the document of line {line + 1}: {how}; remove "
            f"{self._path}.json and write the cache again, which makes this shard anew"
        )
