"""A full disk ends no run that could go on: what can wait waits, what cannot is said once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fbitrain.base import optional_writes
from fbitrain.base.errors import UserError
from fbitrain.base.optional_writes import JsonLines
from fbitrain.checkpoint_files import TrainerState
from fbitrain.config import load_config
from fbitrain.metrics_writer import MetricsWriter
from fbitrain.run_folder import write_finished
from fbitrain.tensorboard_page import EVENTS


class Disk:
    """os.write on a disk with `free` bytes left."""

    def __init__(self, free: int) -> None:
        self.free, self._write = free, os.write

    def __call__(self, file: int, data: bytes) -> int:
        if not self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(file, data[: self.free])
        self.free -= written
        return written


def test_lines_wait_for_room_and_none_is_cut_or_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = Disk(free=30)
    monkeypatch.setattr(os, "write", disk)
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(5):
        lines.add({"step": step})
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1
    assert said[0].endswith("metrics.jsonl cannot be written: No space left on device; the run goes on and tries again")
    assert (tmp_path / "metrics.jsonl").stat().st_size == 30
    disk.free = 10**6
    lines.add({"step": 5})
    lines.close()
    assert capsys.readouterr().out == f"{tmp_path}/metrics.jsonl can be written again\n"
    found = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("before", "kept"), [('{"st', ['{"st']), ('{"step": 1}\n', ['{"step": 1}']), ("", [])])
def test_half_a_line_of_an_earlier_process_spoils_no_other(tmp_path: Path, before: str, kept: list[str]) -> None:
    (tmp_path / "log.jsonl").write_text(before)
    lines = JsonLines(tmp_path / "log.jsonl")
    lines.add({"step": 2})
    lines.close()
    assert (tmp_path / "log.jsonl").read_text().splitlines() == [*kept, '{"step": 2}']


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(free=5)
    monkeypatch.setattr(os, "write", disk)
    monkeypatch.setattr(optional_writes, "KEPT_BYTES", 40)
    lines = JsonLines(tmp_path / "log.jsonl")
    for step in range(1000):
        lines.add({"step": step})
    disk.free = 10**6
    lines.close()
    found = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert found == [0, 1, 2, 3]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("SKIPPED LOUDLY: mounting a small tmpfs needs root; the full-disk test did not run")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_metrics_and_tensorboard_on_a_disk_that_fills_up(
    workspace: Any, disk: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    config = load_config(workspace.config, [f"run.dir={disk}", "run.name=run"])
    config.run_dir.mkdir()
    before = threading.active_count()
    writer = MetricsWriter(config, 0)
    writer.scalars(1, 10, {"train/loss": 1.0})
    writer.histograms(1, {})
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(10**6))
    for step in range(2, 400):
        writer.scalars(step, 10 * step, {"train/loss": 1.0 / step, "optim/lr": 0.1})
        writer.histograms(step, {})
    with pytest.raises(UserError, match=r"the run folder .*run cannot be written: No space left on device; free space"):
        write_finished(config, TrainerState(400, 4000))
    filler.unlink()
    writer.scalars(400, 4000, {"train/loss": 0.5})
    writer.histograms(400, {})
    writer.close()
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 401))
    assert len(list((config.run_dir / "tensorboard").rglob(EVENTS))) <= 3
    assert threading.active_count() <= before + 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(config.run_dir / "tensorboard" / "run")).Reload()
    assert {event.step for event in board.Scalars("1 overview/1 loss")} >= {1, 400}
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    assert said.out.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert said.out.count("TensorBoard's page in") == 2


def test_a_log_file_on_a_full_disk_ends_nothing() -> None:
    code = (
        "import os, sys; from fbitrain.base.optional_writes import never_fail_to_print; never_fail_to_print()\n"
        "for _ in range(9999): print('a line', flush=True); print('a line', file=sys.stderr)\n"
        "open(sys.argv[1], 'w').write('the end')"
    )
    python = [sys.executable, "-c", code]
    with open("/dev/full", "w") as full:
        there = subprocess.run([*python, "/dev/stdout"], stdout=subprocess.PIPE, stderr=full, text=True)
        assert there.returncode == 0
        assert there.stdout.endswith("the end")
        assert subprocess.run([*python, "/dev/null"], stdout=full, stderr=full).returncode == 0
