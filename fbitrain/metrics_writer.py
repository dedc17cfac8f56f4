"""metrics.jsonl and TensorBoard of a run: the same scalars in both."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fbitrain.files import fsync_file, write_text


class MetricsWriter:
    """metrics.jsonl and TensorBoard of a run; on ranks other than 0 it does nothing.

    Lines after `step` are dropped: a resumed run repeats those steps.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self._active = dist.get_rank() == 0
        if not self._active:
            return
        self._path = run_dir / "metrics.jsonl"
        write_text(self._path, "".join(line + "\n" for line in lines_up_to(self._path, step or -1)))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)

    def scalars(self, step: int, tokens: int, scalars: Mapping[str, float]) -> None:
        if self._active:
            line = {"step": step, "tokens": tokens, "time": round(time.time(), 3), **scalars}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        if self._active:
            for name, text in texts.items():
                self._board.add_text(name, f"```\n{text}\n```", step)

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        if self._active:
            for name, tensor in values.items():
                if not torch.isfinite(tensor).all():
                    continue
                kind = name.rsplit(".", 1)[-1]
                self._board.add_histogram(f"{kind}/{name.removeprefix('model.')}", tensor.numpy(), step)
            self._board.flush()

    def close(self) -> None:
        if self._active:
            self._file.close()
            fsync_file(self._path)
            self._board.close()


def lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to `step`; a last line that a crash cut short is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    return kept
