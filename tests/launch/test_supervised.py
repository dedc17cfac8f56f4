"""`fbitrain run` with real ranks: one is killed, and the run finishes by itself. The decisions: tests/supervising."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch


class Supervised:
    """A supervisor of real ranks of the tests' workspace."""

    def __init__(self, workspace: Any, folder: Path, *overrides: str) -> None:
        self.run_dir, self._log = folder / "runs" / "supervised", folder / "log"
        options = ("--ranks", "2", "--backoff", "0")
        settings = (f"run.dir={folder / 'runs'}", "run.name=supervised", *overrides)
        command = [
            sys.executable,
            "-m",
            "fbitrain",
            "run",
            *options,
            "--",
            "pretrain",
            str(workspace.config),
            *settings,
        ]
        with self._log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """Rank -> process, of those that run now."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environ = dict(word.partition(b"=")[::2] for word in (folder / "environ").read_bytes().split(b"\0"))
            except (OSError, ValueError):
                continue
            if f"run.dir={self.run_dir.parent}".encode() in words and b"RANK" in environ:
                found[int(environ[b"RANK"])] = int(folder.name)
        return found

    def wait_for(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.output[-3000:]
            assert time.monotonic() < deadline, self.output[-3000:]
            time.sleep(0.05)

    def steps(self) -> list[int]:
        path = self.run_dir / "metrics.jsonl"
        lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
        return [line["step"] for line in lines if "train/loss" in line]


QUICK = ("eval.every=0", "checkpoint.every=1", "checkpoint.keep=2", "train.total_steps=40", "optim.warmup_steps=2")


def test_a_killed_rank_is_no_reason_to_get_up(workspace: Any, tmp_path: Path) -> None:
    run = Supervised(workspace, tmp_path, *QUICK)
    try:
        run.wait_for(lambda: max(run.steps(), default=0) >= 3)
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.process.wait(180) == 0, run.output[-3000:]
    finally:
        run.process.kill()
    assert not run.ranks()
    assert json.loads((run.run_dir / "FINISHED.json").read_text())["step"] == 40
    first, second = map(json.loads, (run.run_dir / "attempts.jsonl").read_text().splitlines())
    assert (first["end"], first["reason"], first["ranks"]) == ("failed", "rank 1 was ended by SIGKILL", 2)
    assert 2 <= first["step"] == second["from_step"] < second["step"] == 40
    assert run.steps() == list(range(1, 41))


@pytest.mark.slow
def test_a_stop_saves_and_an_error_of_the_user_ends_it(workspace: Any, tmp_path: Path) -> None:
    run = Supervised(workspace, tmp_path, *QUICK)
    run.wait_for(lambda: max(run.steps(), default=0) >= 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(120) == 0, run.output[-3000:]
    stopped = json.loads((run.run_dir / "STOPPED.json").read_text())
    assert stopped["reason"] == "signal SIGTERM"
    assert f"step_{stopped['step']:08d}" in {path.name for path in run.run_dir.glob("checkpoints/*")}
    assert not run.ranks()
    refused = Supervised(workspace, tmp_path, *QUICK, "data.seed=9")
    assert refused.process.wait(120) == 1
    assert refused.output.count("belongs to another configuration") == 2, "by the rank, and by the supervisor"
    assert "gives up: a restart cannot mend that" in refused.output
