"""What `debug.log_batches` and `debug.log_documents` write into the run folder, to compare two runs batch by batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fbitrain.base.optional_writes import JsonLines


class BatchLog:
    """debug.log_batches: a hash of every micro-batch, so that two runs can be compared batch by batch."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._lines = JsonLines(run_dir / f"batches_rank{rank:05d}.jsonl")
        self._digests: list[str] = []

    def add(self, batch: Tensor) -> None:
        """A micro-batch of the step that is going on; a step that is dropped leaves no lines."""
        self._digests.append(hashlib.sha256(batch.numpy().tobytes()).hexdigest())

    def end_step(self, step: int) -> None:
        for digest in self._digests:
            self._lines.add({"step": step, "sha256": digest})
        self._digests = []


class DocumentLog:
    """debug.log_documents: which documents begin in each step's batches, so that none is missed or read twice."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._lines = JsonLines(run_dir / f"documents_rank{rank:05d}.jsonl")

    def add(self, step: int, documents: Sequence[str], left_out: str) -> None:
        """left_out: why nothing was learnt from the step; empty for all others."""
        self._lines.add({"step": step, "documents": documents} | ({"left_out": left_out} if left_out else {}))

    def rewound(self, step: int, to: int) -> None:
        """After `step` the weights are those of step `to`: nothing is left of the documents between."""
        self._lines.add({"step": step, "rewound_to": to})
