"""What `debug.log_batches` and `debug.log_documents` write into the run folder, to compare two runs batch by batch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


class BatchLog:
    """debug.log_batches: a hash of every micro-batch, so that two runs can be compared batch by batch."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._file = (run_dir / f"batches_rank{rank:05d}.jsonl").open("a", encoding="utf-8")

    def add(self, step: int, batch: Tensor) -> None:
        digest = hashlib.sha256(batch.numpy().tobytes()).hexdigest()
        self._file.write(json.dumps({"step": step, "sha256": digest}) + "\n")
        self._file.flush()


class DocumentLog:
    """debug.log_documents: which documents begin in each step's batches, so that none is missed or read twice."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._file = (run_dir / f"documents_rank{rank:05d}.jsonl").open("a", encoding="utf-8")

    def add(self, step: int, documents: Sequence[str]) -> None:
        self._file.write(json.dumps({"step": step, "documents": documents}) + "\n")
        self._file.flush()
