"""The watch of each rank, and what the ranks say together; threads stand in for ranks, a dictionary for the store."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fbitrain import hangs
from fbitrain.base.processes import machine
from fbitrain.hang_report import Report, _ranges, culprits, report_text
from fbitrain.hangs import Board, Watch
from fbitrain.lost_ranks import Process
from fbitrain.step_clock import Position


class Store:
    """As torch's, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.broken = False

    def clone(self) -> Store:
        return self

    def set_timeout(self, timeout: timedelta) -> None: ...

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return keys[0] in self.values

    def get(self, key: str) -> str:
        return self.values[key]

    def _answer(self) -> None:
        if self.broken:
            raise RuntimeError("the store does not answer")


@dataclass
class Peers:
    rank: int
    processes: list[Process]
    launch: str = "launch"
    claimed: list[list[int]] = field(default_factory=list)

    def claim(self, processes: list[Process]) -> bool:
        self.claimed.append([process.rank for process in processes])
        return True


@dataclass
class Clock:
    position: Position
    limit_s: float = 5.0


HERE = Position("backward", 7, 2, 4, 12, "all_reduce", True)
AT_DATA = Position("data", 7, 2, 4, 11, "all_reduce", False)


def processes(n: int) -> list[Process]:
    return [Process(rank, os.getpid(), "0", f"node{rank}", machine()) for rank in range(n)]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that watches look at; waiting for others is cut short."""
    time = [0.0]
    monkeypatch.setattr(hangs.time, "monotonic", lambda: time[0])
    monkeypatch.setattr(hangs, "PATIENCE_S", 0.0)
    return time


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    shared = Store()
    monkeypatch.setattr(hangs, "Board", lambda launch: Board(launch, shared))
    return shared


def watches(run_dir: Path, *positions: Position) -> list[Watch]:
    found = processes(len(positions))
    return [
        Watch(Clock(position), Peers(rank, found), run_dir, end=lambda code: None)  # type: ignore[arg-type]
        for rank, position in enumerate(positions)
    ]


def looks(watch: Watch, now: list[float], seconds: float) -> bool:
    """Whether a look finds a hang within so many seconds."""
    end = now[0] + seconds
    while now[0] < end:
        now[0] += 1.0
        if watch.hangs():
            return True
    return False


def test_a_rank_that_moves_does_not_hang(now: list[float], store: Store, tmp_path: Path) -> None:
    (watch,) = watches(tmp_path, HERE)
    for i in range(20):
        watch.clock.position = HERE._replace(collective=i)
        assert not looks(watch, now, 4.0)
    assert looks(watch, now, 7.0)


def test_the_time_of_a_suspended_job_is_no_hang(now: list[float], store: Store, tmp_path: Path) -> None:
    (watch,) = watches(tmp_path, HERE)
    now[0] += 3600.0
    assert not watch.hangs()


def test_all_ranks_report_when_one_has_waited_too_long(
    now: list[float],
    store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hangs, "PATIENCE_S", 1.0)  # for ever, as the time stands still
    first, second = watches(tmp_path, HERE, AT_DATA)
    second.hangs()
    assert looks(first, now, 7.0)
    now[0] += 0.1
    assert second.hangs(), "it was called"
    other = threading.Thread(target=second.report)
    other.start()
    first.report()
    other.join()
    words = capsys.readouterr().err
    assert words.count("\n") == 2, "one of them says it"
    assert "nothing has moved for 5 s: rank 1 (process " in words
    assert "on node1) hangs, and the other ranks wait; " in words
    assert "rank 1: data in micro-batch 2 of 4 of step 7, after collective 11 (all_reduce), at " in words
    assert first.peers.claimed == [[1]]  # type: ignore[attr-defined]
    for rank in (0, 1):
        stacks = (tmp_path / "hangs" / f"step_7_rank_{rank}.txt").read_text()
        assert "most recent call first" in stacks
        assert (tmp_path / "hangs" / f"step_7_collectives_rank_{rank}").is_file()


def test_a_silent_rank_is_named_with_where_it_was(
    now: list[float], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = watches(tmp_path, HERE, AT_DATA)
    second.hangs()
    assert looks(first, now, 7.0)
    first.report()
    words = capsys.readouterr().err
    assert "on node1) does not answer (state of the process: " in words
    assert "; rank 1: last seen data in micro-batch 2 of 4 of step 7" in words


def test_without_a_store_and_a_folder_a_rank_still_says_where_it_is(
    now: list[float], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, _ = watches(tmp_path / "gone", HERE, AT_DATA)
    store.broken = True
    ended = threading.Event()
    first.end = lambda code: ended.set()
    assert looks(first, now, 7.0)
    first.report()
    words = capsys.readouterr().err
    assert ended.is_set()
    assert "takes no stacks: No such file or directory" in words
    assert "where the ranks are: rank 0: backward in micro-batch 2 of 4" in words
    assert "; rank 1: never seen" in words


def reports(*positions: Position) -> dict[int, Report]:
    return {rank: Report(rank, position) for rank, position in enumerate(positions)}


def test_culprits() -> None:
    assert culprits(reports(HERE, AT_DATA, HERE), 3) == [1]
    assert culprits(reports(HERE, HERE), 3) == [2]
    assert culprits(reports(HERE, HERE), 2) == []
    assert culprits(reports(AT_DATA, AT_DATA), 2) == [0, 1], "none waits for another"


def test_what_is_said_of_many() -> None:
    def words(*positions: Position) -> str:
        return report_text(reports(*positions), {}, processes(len(positions)), Path("hangs"), 300.0)

    assert "all ranks have entered the same collective, so a device hangs" in words(HERE, HERE)
    everyone = words(*[AT_DATA] * 6)
    assert " and 2 more hang; hangs has" in everyone
    assert everyone.endswith("ranks 0-5: data in micro-batch 2 of 4 of step 7, after collective 11 (all_reduce)")
    assert _ranges([0, 2, 3, 4, 7]) == "0, 2-4, 7"


def test_a_process_elsewhere_has_no_state() -> None:
    far = [replace(process, machine="another") for process in processes(2)]
    text: Any = report_text(reports(HERE), {}, far, Path("hangs"), 300.0)
    assert "rank 1 (process " in text
    assert "does not answer (lost, cut off or stopped), and the other ranks wait" in text
