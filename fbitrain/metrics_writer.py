"""metrics.jsonl and TensorBoard of a run. A scalar is known by its key in metrics.jsonl everywhere but on the page."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from fbitrain.base.files import write_text
from fbitrain.base.optional_writes import JsonLines, OptionalWrites
from fbitrain.config import Config
from fbitrain.tensorboard_page import TensorBoardPage


class MetricsWriter:
    """metrics.jsonl and TensorBoard of a run; on ranks other than 0 it does nothing.

    Lines after `step` are dropped: a resumed run repeats those steps. Raises OSError if the files cannot be made; from
    then on a full disk is said, not raised: lines of metrics.jsonl wait for room, events of TensorBoard are lost.
    """

    def __init__(self, config: Config, step: int) -> None:
        self._active = dist.get_rank() == 0
        if not self._active:
            return
        path = config.run_dir / "metrics.jsonl"
        write_text(path, "".join(line + "\n" for line in lines_up_to(path, step or -1)))
        self._lines = JsonLines(path)
        self._config = config
        self._page: TensorBoardPage | None = TensorBoardPage(config, step)
        self._page_writes = OptionalWrites(f"TensorBoard's page in {config.run_dir}")

    def scalars(self, step: int, tokens: int, scalars: Mapping[str, float]) -> None:
        if self._active:
            self._lines.add({"step": step, "tokens": tokens, "time": round(time.time(), 3), **scalars})
            self._to_page(step, lambda page: page.scalars(step, scalars))

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        if self._active:
            self._to_page(step, lambda page: page.texts(step, texts))

    def histograms(self, step: int, scales: Mapping[str, Tensor]) -> None:
        if self._active:
            self._to_page(step, lambda page: page.histograms(step, scales))

    def close(self) -> None:
        if self._active:
            self._lines.close()
            if self._page:
                self._page_writes(self._page.close)

    def _to_page(self, step: int, write: Callable[[TensorBoardPage], None]) -> None:
        if not self._page_writes(lambda: write(self._open_page(step))) and self._page:
            with suppress(OSError):  # its thread has ended with the error: the next write opens a page anew
                self._page.close()
            self._page = None

    def _open_page(self, step: int) -> TensorBoardPage:
        if self._page is None:
            require_room(self._config.run_dir)  # each try on a full disk would leave an empty file and a thread
            self._page = TensorBoardPage(self._config, step)
        return self._page


def require_room(folder: Path, n_bytes: int = 2**16) -> None:
    """Raises OSError if a file of `n_bytes` cannot be written into `folder`."""
    probe = folder / f".room.{os.getpid()}.tmp"
    try:
        probe.write_bytes(bytes(n_bytes))
    finally:
        probe.unlink(missing_ok=True)


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
