"""metrics.jsonl and TensorBoard of a run. A scalar is known by its key in metrics.jsonl everywhere but on the page."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from fbitrain.base.files import fsync_file, write_text
from fbitrain.config import Config
from fbitrain.tensorboard_page import TensorBoardPage


class MetricsWriter:
    """metrics.jsonl and TensorBoard of a run; on ranks other than 0 it does nothing.

    Lines after `step` are dropped: a resumed run repeats those steps.
    """

    def __init__(self, config: Config, step: int) -> None:
        self._active = dist.get_rank() == 0
        if not self._active:
            return
        self._path = config.run_dir / "metrics.jsonl"
        write_text(self._path, "".join(line + "\n" for line in lines_up_to(self._path, step or -1)))
        self._file = self._path.open("a", encoding="utf-8")
        self._page = TensorBoardPage(config, step)

    def scalars(self, step: int, tokens: int, scalars: Mapping[str, float]) -> None:
        if self._active:
            line = {"step": step, "tokens": tokens, "time": round(time.time(), 3), **scalars}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            self._page.scalars(step, scalars)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        if self._active:
            self._page.texts(step, texts)

    def histograms(self, step: int, scales: Mapping[str, Tensor]) -> None:
        if self._active:
            self._page.histograms(step, scales)

    def close(self) -> None:
        if self._active:
            self._file.close()
            fsync_file(self._path)
            self._page.close()


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
