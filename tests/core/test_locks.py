"""Locks on a file system without flock: held, left behind by the dead, and taken over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fbitrain.base import locks
from fbitrain.base.files import lock_folder, scratch_folder
from fbitrain.base.locks import lock

EXCLUSIVE, SHARED = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB
HOLDER = """
import errno, fcntl, sys, time
from pathlib import Path

def refuse(*_):
    raise OSError(errno.ENOSYS, "no flock")

fcntl.flock = refuse
from fbitrain.base import locks
from fbitrain.base.files import lock_folder
locks.BEAT_S = 0.1
print(lock_folder(Path(sys.argv[1])), flush=True)
time.sleep(60)
"""


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], autouse=True)
def no_flock(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(locks, "BEAT_S", 0.1)
    monkeypatch.setattr(locks, "STALE_S", 1.0)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        yield process
        process.kill()


def test_a_folder_is_held_by_one_process_and_free_when_it_dies(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert not lock_folder(tmp_path)
    holder.kill()
    holder.wait()
    began = time.monotonic()
    assert lock_folder(tmp_path)
    assert time.monotonic() - began < 1, "nobody has to wait for a process that is known to be gone"


def test_a_process_of_another_machine_is_believed_while_it_beats(tmp_path: Path) -> None:
    beat = tmp_path / ".lock.beat"
    beat.write_text(json.dumps({"machine": "node7", "pid": os.getpid(), "started": "1", "token": "a"}))
    over = threading.Event()

    def beats() -> None:
        while not over.wait(0.1):
            os.utime(beat)

    threading.Thread(target=beats, daemon=True).start()
    assert not lock_folder(tmp_path)
    over.set()
    time.sleep(0.3)
    began = time.monotonic()
    assert lock_folder(tmp_path), "a dead node's lock blocks for ever"
    assert 0.3 < time.monotonic() - began < 5


def test_what_is_held_is_touched_and_goes_with_its_release(tmp_path: Path) -> None:
    held = lock(0, tmp_path / "file", EXCLUSIVE)
    assert held is not None
    before = held.file.stat().st_mtime
    with pytest.raises(BlockingIOError):
        lock(0, tmp_path / "file", EXCLUSIVE)
    deadline = time.monotonic() + 15  # the thread may be in its first, longer wait
    while held.file.stat().st_mtime == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert held.file.stat().st_mtime > before
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_many_share_what_nobody_has_alone(tmp_path: Path) -> None:
    first, second = lock(0, tmp_path / "file", SHARED), lock(0, tmp_path / "file", SHARED)
    assert first is not None
    assert second is not None
    with pytest.raises(BlockingIOError):
        lock(0, tmp_path / "file", EXCLUSIVE)
    first.release()
    with pytest.raises(BlockingIOError):
        lock(0, tmp_path / "file", EXCLUSIVE)
    second.release()
    alone = lock(0, tmp_path / "file", EXCLUSIVE)
    assert alone is not None
    with pytest.raises(BlockingIOError):
        lock(0, tmp_path / "file", SHARED)
    alone.release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_was_taken_over_from_notices(tmp_path: Path) -> None:
    held = lock(0, tmp_path / "file", EXCLUSIVE)
    assert held is not None
    other = {**json.loads(held.file.read_text()), "token": "another"}
    held.file.write_text(json.dumps(other))
    assert not held.touch()
    held.release()
    assert json.loads(held.file.read_text()) == other, "another's lock was released"


def test_scratch_folders_are_held_from_outside(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "scratch") as folder:
        assert list(folder.iterdir()) == []
        assert (tmp_path / ".scratch.beat").is_file()
    assert list(tmp_path.iterdir()) == []
