"""The loader's worker processes: signals, deaths, and what they import."""

from __future__ import annotations

import dataclasses
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig
from fbitrain.data.loader import TokenLoader
from fbitrain.data.streaming.worker import WorkerProcess
from tests.data.corpora import rank_loader, take


def workers(loader: TokenLoader) -> list[WorkerProcess]:
    return [feed for feed in loader._feeds.values() if isinstance(feed, WorkerProcess)]


def test_workers_ignore_a_launchers_signals_and_end_with_close(data: DataConfig, byte_tokenizer: str) -> None:
    loader = rank_loader(dataclasses.replace(data, n_workers=1), byte_tokenizer)
    process = workers(loader)[0].process
    for number in (signal.SIGTERM, signal.SIGINT):  # at once, while the interpreter is still starting
        os.kill(process.pid, number)
    first, _ = take(loader, 3)
    os.kill(process.pid, signal.SIGTERM)
    assert first + take(loader, 300)[0] == take(rank_loader(data, byte_tokenizer), 303)[0]
    loader.close()
    loader.close()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_worker_is_an_error(data: DataConfig, byte_tokenizer: str) -> None:
    with rank_loader(dataclasses.replace(data, n_workers=2), byte_tokenizer) as loader:
        next(loader)
        workers(loader)[1].process.kill()
        with pytest.raises(UserError, match="was killed by signal 9"):
            take(loader, 100_000)


def test_a_worker_that_raises_is_an_error(data: DataConfig, byte_tokenizer: str, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr("fbitrain.data.streaming.worker.COMMAND", "raise MemoryError('no room')")
    with pytest.raises(UserError, match="ended with exit status 1"):
        next(rank_loader(dataclasses.replace(data, n_workers=1), byte_tokenizer))
    assert "no room" in capfd.readouterr().err


def test_workers_end_with_a_killed_parent(data: DataConfig, byte_tokenizer: str, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"  # no main guard: a worker must not import it
    script.write_text(
        "from fbitrain.data.loader import TokenLoader\n"
        "from fbitrain.data.config import *\n"
        "from fbitrain.data.tokenizer import load_tokenizer\n"
        f"tokenizer = load_tokenizer({byte_tokenizer!r})\n"
        f"loader = TokenLoader({dataclasses.replace(data, n_workers=1)!r}, tokenizer, 0, 1, 1)\n"
        "next(loader)\n"
        "import os, sys\n"
        "if os.fork():\n"
        "    print(loader._feeds[0].process.pid, flush=True)\n"
        "sys.stdin.read()\n"  # both stay; the child, as a fork does, holds the worker's pipe open
        "os._exit(0)\n"
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker = os.pidfd_open(int(trainer.stdout.readline()))
        trainer.kill()
        readable = select.select([worker], [], [], 10.0)[0]  # a pidfd turns readable when its process ends
        os.close(worker)
    assert readable


def test_workers_need_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub'}"
    check = f"import sys, fbitrain.data.streaming.worker; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
