"""Asking a teacher for the targets of one piece of a shard, and writing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fbitrain.data.pretokenized.token_shards import (
    BAD,
    BORDERED,
    Records,
    TokenIds,
    TokenIndex,
    map_shard,
    source_folder,
)
from fbitrain.targets.cache_files import CacheFiles, writing_cache
from fbitrain.targets.cache_folder import PLACE, CacheSettings
from fbitrain.targets.draws import Drawing
from fbitrain.targets.frames import FRAME_TOKENS, FrameFormat, Targets
from fbitrain.targets.pieces import Piece
from fbitrain.targets.windows import Window, batches, padded, windows

CHUNK_TOKENS = 256  # whose logits exist at one time

Border = tuple[Sequence[int], Sequence[int]]  # what goes before a document and behind it


class TeacherModel(Protocol):
    """What is asked of a teacher (fbitrain.teacher)."""

    @property
    def head_weight(self) -> Tensor: ...  # [V, D]
    def hidden(self, input_ids: Tensor) -> Tensor: ...  # int64 [B, T] -> [B, T, D]


class _Texts(NamedTuple):
    """The documents of a piece."""

    lines: list[int]
    documents: list[npt.NDArray[np.int32]]  # each [L], as it is trained on
    uniforms: list[npt.NDArray[np.float64]]  # each [L - 1, …], what its draws are made of


class PieceWriter:
    """Asks the teacher and writes pieces into `folder`. `n_words` and `n_bytes` count what `n_tokens` targets took."""

    def __init__(
        self,
        folder: Path,
        index: TokenIndex,
        settings: CacheSettings,
        border: Border,
        teacher: TeacherModel,
        batch_tokens: int,
    ) -> None:
        self._folder, self._index, self._settings, self._border = folder, index, settings, border
        self._teacher, self._batch_tokens = teacher, batch_tokens
        self._drawing = Drawing(settings)
        self._format = FrameFormat(settings.vocab_size, settings.weight_dtype)
        self.n_tokens = self.n_words = self.n_bytes = 0

    def measure(self, piece: Piece) -> tuple[int, int]:
        """Targets and bytes of one batch of the piece, of which nothing is written."""
        texts = self._texts(piece)
        asked = [targets for _, targets in self._ask(next(self._batches(texts)), texts)]
        n_bytes = sum(len(self._format.encode(targets)) + PLACE.itemsize for targets in asked)
        return sum(len(targets.n) for targets in asked), n_bytes

    def write(self, piece: Piece) -> Iterator[int]:
        """Writes the piece's files; yields, after every forward of the teacher, how many targets it gave.

        Raises UserError where the files cannot be written.
        """
        texts = self._texts(piece)
        found: list[list[tuple[int, Targets]]] = [[] for _ in texts.documents]
        for batch in self._batches(texts):
            for window, targets in self._ask(batch, texts):
                found[window.document].append((window.first, targets))
            yield sum(window.n_targets for window in batch)
        with writing_cache(piece.path(self._folder), piece.report) as files:
            for line, of_document in zip(texts.lines, found, strict=True):
                if of_document:
                    in_order = [targets for _, targets in sorted(of_document, key=lambda item: item[0])]
                    self._add(files, line, Targets(*(np.concatenate(arrays) for arrays in zip(*in_order, strict=True))))
        self.n_tokens += files.n_tokens
        self.n_words += files.n_words
        self.n_bytes += files.n_bytes

    def _texts(self, piece: Piece) -> _Texts:
        report = piece.report
        records, tokens = map_shard(source_folder(self._index.folder, piece.source) / report.name, report)
        lines, documents = _documents(records[piece.first : piece.stop], tokens, self._border)
        uniforms = [
            self._drawing.uniforms(max(0, len(document) - 1), piece.source, report.name, line)
            for line, document in zip(lines, documents, strict=True)
        ]
        return _Texts(lines, documents, uniforms)

    def _batches(self, texts: _Texts) -> Iterator[list[Window]]:
        context, overlap = self._settings.context, self._settings.overlap
        every = [
            window
            for i, document in enumerate(texts.documents)
            for window in windows(i, len(document), context, overlap)
        ]
        return batches(every, self._batch_tokens)

    def _ask(self, batch: Sequence[Window], texts: _Texts) -> Iterator[tuple[Window, Targets]]:
        head_VD = self._teacher.head_weight
        hidden_BTD = self._teacher.hidden(torch.from_numpy(padded(batch, texts.documents)).to(head_VD.device))
        # Position p of a window predicts token start + p + 1.
        rows = zip(hidden_BTD, batch, strict=True)
        hidden_MD = torch.cat([row[of.first - 1 - of.start : of.stop - of.start] for row, of in rows])
        uniforms = np.concatenate([texts.uniforms[window.document][window.first - 1 : window.stop] for window in batch])
        targets = self._drawing.targets(
            lambda rows: hidden_MD[rows] @ head_VD.t(), torch.from_numpy(uniforms).to(head_VD.device), CHUNK_TOKENS
        )
        ends = np.cumsum(targets.n, dtype=np.int64)
        at, word = 0, 0
        for window in batch:
            to = at + window.n_targets
            words = slice(word, int(ends[to - 1]))
            yield window, Targets(targets.n[at:to], targets.ids[words], targets.weights[words])
            at, word = to, words.stop

    def _add(self, files: CacheFiles, line: int, targets: Targets) -> None:
        ends = np.concatenate([[0], np.cumsum(targets.n, dtype=np.int64)])
        for at in range(0, len(targets.n), FRAME_TOKENS):
            to = min(at + FRAME_TOKENS, len(targets.n))
            words = slice(ends[at], ends[to])
            part = Targets(targets.n[at:to], targets.ids[words], targets.weights[words])
            files.add(line, at + 1, part, self._format.encode(part))


def _documents(records: Records, tokens: TokenIds, border: Border) -> tuple[list[int], list[npt.NDArray[np.int32]]]:
    """Line and tokens, as they are trained on, of the documents among `records`."""
    before, after = (np.array(ids, np.int32) for ids in border)
    lines, documents = [], []
    for record in records:
        if record["flags"] & BAD:
            continue
        ids = tokens[record["first_token"] : record["first_token"] + record["n_tokens"]].astype(np.int32)
        lines.append(int(record["line"]))
        documents.append(np.concatenate([before, ids, after]) if record["flags"] & BORDERED else ids)
    return lines, documents
