"""Worker processes of the data room's commands: order, errors, and what happens to them when someone dies."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.tools.parallel import in_processes

# The processes import what they are to do; this file is none that they could import.
WORK = """
import os, signal, time
from fbitrain.base.errors import UserError

def slow_when_early(job):
    time.sleep(0.2 if job == 0 else 0)
    return job, os.getpid()

def fails_at_two(job):
    if job == 2:
        raise UserError("shard 2 is broken; mend it")
    return job

def dies(job):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "parallel_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("parallel_work")
    del sys.modules["parallel_work"]


@pytest.mark.parametrize("n_workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(work: ModuleType, n_workers: int) -> None:
    results = list(in_processes(work.slow_when_early, range(6), n_workers))
    assert [job for job, _ in results] == list(range(6))
    processes = {process for _, process in results}  # one may have done all before the other has started
    assert (os.getpid() in processes) == (n_workers == 1)
    assert len(processes) <= n_workers


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_error_for_the_user_arrives_as_it_was(work: ModuleType, n_workers: int) -> None:
    results = in_processes(work.fails_at_two, range(4), n_workers)
    with pytest.raises(UserError, match="shard 2 is broken; mend it"):
        list(results)


def test_a_killed_process_is_an_error_and_not_a_wait(work: ModuleType) -> None:
    with pytest.raises(UserError, match="was killed by signal 9"):
        list(in_processes(work.dies, range(2), 2))


def test_processes_end_with_the_iterator(work: ModuleType) -> None:
    results = in_processes(work.slow_when_early, range(6), 2)
    _, process = next(results)
    results.close()
    assert not is_alive(process)


def test_processes_leave_when_their_caller_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "caller.py"
    script.write_text(
        "import os, time\n"
        "from fbitrain.data.tools.parallel import in_processes\n"
        "def work(job):\n"
        "    os.write(1, f'{os.getpid()}\\n'.encode())\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(in_processes(work, range(2), 2))\n"
    )
    caller = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    processes = [int(caller.stdout.readline()) for _ in range(2)]
    assert all(map(is_alive, processes))
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 10
    while any(map(is_alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    caller.stdout.close()
    assert not any(map(is_alive, processes))


def is_alive(process: int) -> bool:
    """A process that is gone, or a zombie that nobody has waited for yet, is not."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
