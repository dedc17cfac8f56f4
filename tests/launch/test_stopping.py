"""Real launches that are stopped in time: in the middle of a long step, at the end of a job, and saved by the clock."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch
FAULTS = Path(__file__).with_name("faulty_pretrain.py")


@pytest.fixture(scope="module")
def reference(launch: Any) -> Any:
    """Six uninterrupted steps of four micro-batches, with one tokenizer process for each rank."""
    return launch("reference", "data.n_workers=1", "debug.log_documents=true")


def checkpoints(run: Any) -> list[str]:
    return sorted(path.parent.name for path in run.run_dir.glob("checkpoints/*/COMPLETE.json"))


def logs(run: Any) -> dict[str, str]:
    return {path.name: path.read_text() for path in run.run_dir.glob("*_rank*.jsonl")}


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3)), 1])
def test_a_long_step_is_dropped_and_repeated_whole(launch: Any, reference: Any, stage: int) -> None:
    options = [f"engine.zero_stage={stage}", "data.n_workers=1", "debug.log_documents=true", "checkpoint.every=100"]
    slow = {"FAULT": "slow_micro_batches_in_step_4"}
    run = launch.start(f"long{stage}", *options, "checkpoint.stop_within_s=1", script=FAULTS, env=slow)
    run.wait_for(lambda: "step 4 has begun" in run.output)
    run.signal(signal.SIGTERM)
    told = time.monotonic()
    run.wait_for_all()
    assert time.monotonic() - told < 24, "the step was finished"
    marker = json.loads((run.run_dir / "STOPPED.json").read_text())
    assert (marker["step"], marker["reason"]) == (3, "signal SIGTERM")
    assert checkpoints(run) == ["step_00000003"]
    again = launch(f"long{stage}", *options)
    assert again.losses == (reference.losses if stage == 1 else pytest.approx(reference.losses, rel=2e-4))
    assert logs(again) == logs(reference), "a batch was left out, or drawn twice"


@pytest.mark.slow
def test_the_clock_saves_too(launch: Any, reference: Any) -> None:
    run = launch("minutes", "checkpoint.every=100", "checkpoint.every_minutes=1e-6")
    assert checkpoints(run) == [f"step_{step:08d}" for step in range(1, 7)]
    assert run.losses == reference.losses
    assert checkpoints(launch("steps", "checkpoint.every=100", "checkpoint.every_minutes=0")) == ["step_00000006"]


@pytest.mark.slow
def test_ranks_of_srun_stop_before_the_end_of_the_job(launch: Any, reference: Any) -> None:
    ranks = {"AS_SRUN": "1", "SLURM_JOB_END_TIME": str(int(time.time()) + 600)}
    options = ("checkpoint.every=100", "engine.threads_per_rank=0")
    run = launch.start("job", *options, "checkpoint.margin_s=3600", env=ranks)
    assert run.wait() == 0, run.output[-3000:]
    assert json.loads((run.run_dir / "STOPPED.json").read_text())["reason"] == "the end of the job's time"
    assert len(run.losses) <= 1
    run = launch("job", *options, "checkpoint.margin_s=60", env=ranks)
    assert run.losses == reference.losses


def test_a_run_folder_without_flock(launch: Any, reference: Any) -> None:
    run = launch("no-flock", script=FAULTS, env={"FAULT": "no_flock"})
    assert run.losses == reference.losses
    assert not (run.run_dir / ".lock.beat").exists()
