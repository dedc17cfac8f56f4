"""What a rank takes over from srun, and when it stops: without ranks, SLURM or waiting."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from fbitrain import slurm, stopping
from fbitrain.config import CheckpointConfig

OF_SRUN = {
    **{"SLURM_PROCID": "11", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "20", "SLURM_NODEID": "1"},
    **{"SLURM_STEP_NODELIST": "gpu[007-009,12]", "SLURM_STEP_TASKS_PER_NODE": "8,4(x3)", "SLURM_CPUS_PER_TASK": "6"},
    **{"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "0", "SLURM_JOB_END_TIME": "1800000000"},
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("gpu[007-009,12],x", "gpu007"),
        ("r[2,4]n[10-11]", "r2n10"),
        ("n[1]-ib", "n1-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert slurm.first_host(nodes) == first


def test_a_rank_of_srun_knows_its_place() -> None:
    environ = dict(OF_SRUN)
    slurm.adopt_ranks(environ)
    assert {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR")} == {
        **{"RANK": "11", "WORLD_SIZE": "20", "LOCAL_RANK": "3", "LOCAL_SIZE": "4", "MASTER_ADDR": "gpu007"}
    }
    assert 20000 <= int(environ["MASTER_PORT"]) < 40000
    assert slurm.cores_of_rank(environ) == 6
    assert slurm.job_end(environ) == 1.8e9


def test_a_task_that_sees_one_gpu_takes_that() -> None:
    environ = {**OF_SRUN, "CUDA_VISIBLE_DEVICES": "0"}
    slurm.adopt_ranks(environ)
    assert environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    "environ",
    [
        {**OF_SRUN, "RANK": "0"},  # a launcher knows better
        {name: value for name, value in OF_SRUN.items() if "STEP" not in name},  # a batch script, alone
        {**OF_SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # perhaps a shell
        {},
    ],
)
def test_other_processes_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    slurm.adopt_ranks(environ)
    assert environ == before


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of rank 0 of one, with clocks that stand until they are set."""
    monkeypatch.setattr(stopping.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(stopping.signal, "signal", lambda *_: None)
    monkeypatch.setenv("SLURM_JOB_END_TIME", "10000")
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    return stopping.Stop(CheckpointConfig(every_minutes=30, stop_within_s=10, margin_s=300), torch.device("cpu"))


def at(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    monkeypatch.setattr(time, "time", lambda: seconds)


def test_saving_by_the_clock(stop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for now, due in ((1799, False), (1800, True)):
        stop.begin_step(1)
        at(now, monkeypatch)
        assert stop.wishes()[1] is due
    stop.saved()
    assert not stop.wishes()[1]


def test_the_last_step_of_a_job_ends_before_its_margin(stop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for now, ends in ((9500, False), (9620, True)):  # steps of 100 s: the next one would end at 9720
        at(now - 100, monkeypatch)
        stop.begin_step(4)
        at(now, monkeypatch)
        assert stop.wishes()[0] is ends
    assert stop.reason == "the end of the job's time"
    assert not stop._too_late(3)
    at(9700, monkeypatch)
    assert stop._too_late(3)


def test_a_signal_waits_for_a_short_step_only(stop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stop.begin_step(8)
    at(4, monkeypatch)
    stop._note(15, None)
    assert stop.wishes()[0]
    assert not stop._too_late(left=4), "4 micro-batches in 4 s: the rest end 4 s after the signal"
    assert stop._too_late(left=7), "the rest take 28 s"
