"""Real launches whose checkpoints are written while they train on, and what may happen in the middle of that.

What is promised: a kill at any moment leaves the older checkpoint, and the run that resumes from it is the same run.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
HANG = {"FAULT": "kill_in_the_middle_of_an_asynchronous_write", "WRITER_FAULT": "hang"}
LOG = ("checkpoint.every=2", "eval.every=0")


def folders(run: Any) -> list[str]:
    return sorted(path.name for path in (run.run_dir / "checkpoints").iterdir())


def resumed_from(run: Any) -> str:
    return next(line for line in run.output.splitlines() if line.startswith("resumed from")).split("/")[-1]


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3)), 2])
def test_a_kill_in_the_middle_of_a_write_leaves_the_older_checkpoint(launch: Any, stage: int) -> None:
    options = (*LOG, f"engine.zero_stage={stage}")
    reference = launch(f"whole{stage}", *options)
    assert folders(reference) == ["step_00000002", "step_00000004", "step_00000006"]
    who = {"WRITER_RANK": "1" if stage else "0"}  # at stage 0 rank 1 has no tensors to write
    run = launch.start(f"killed{stage}", *options, script=FAULTS, env={**HANG, **who})
    assert run.wait() != 0
    run.wait_for_all()  # the writers end with their ranks
    assert max(run.losses) == 5, "the ranks did not train on while step_00000004 was written"
    assert folders(run) == ["step_00000002", "step_00000004.tmp"]
    again = launch(f"killed{stage}", *options)
    assert resumed_from(again) == "step_00000002"
    assert again.losses == reference.losses
    for rank in (0, 1):
        wanted = [batch for batch in reference.batches(rank) if batch["step"] > 2]
        assert again.batches(rank)[-len(wanted) :] == wanted


@pytest.mark.slow
def test_a_kill_in_a_save_that_training_waits_for_leaves_it_too(launch: Any) -> None:
    options = (*LOG, "checkpoint.asynchronous=false")
    reference = launch("whole-sync", *options)
    run = launch.start("killed-sync", *options, script=FAULTS, env={"FAULT": "kill_in_second_synchronous_save"})
    assert run.wait() != 0
    assert folders(run) == ["step_00000002", "step_00000004.tmp"]
    again = launch("killed-sync", *options)
    assert resumed_from(again) == "step_00000002"
    assert again.losses == reference.losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [("fill_the_disk", r"is full \("), ("die", r"could not be written to .*: its writer, process \d+, was killed")],
)
def test_a_writer_that_fails_on_one_rank_ends_the_run_in_one_sentence(launch: Any, fault: str, words: str) -> None:
    env = {"FAULT": "faulty_writer", "WRITER_FAULT": fault, "WRITER_RANK": "1"}
    run = launch(f"failing-{fault}", *LOG, "train.total_steps=60", script=FAULTS, env=env, expect=1)
    said = [line for line in run.output.splitlines() if line.startswith("fbitrain")]
    assert len(said) == 1, run.output
    assert "step_00000004" in said[0]
    assert re.search(words, said[0])
    assert "Traceback" not in run.output
    assert folders(run) == ["step_00000002"]
    assert max(run.losses) < 60


@pytest.mark.slow
def test_a_stop_signal_while_a_checkpoint_is_written(launch: Any) -> None:
    """Both are complete when the run has ended: the one in flight, and that of the step at which it stopped."""
    same_rate = ("optim.min_lr=5e-3", "eval.every=0")
    env = {"FAULT": "faulty_writer", "WRITER_FAULT": "slow", "WRITER_RANK": "1"}
    run = launch.start("stopped", *same_rate, "train.total_steps=200", "checkpoint.every=3", script=FAULTS, env=env)
    run.wait_for(lambda: max(run.losses, default=0) >= 3)
    run.signal(signal.SIGTERM)
    run.wait_for_all()
    marker = json.loads((run.run_dir / "STOPPED.json").read_text())
    assert marker["reason"] == "signal SIGTERM"
    assert folders(run) == [f"step_{step:08d}" for step in sorted({3, marker["step"]})]
    total = f"train.total_steps={marker['step'] + 2}"
    again = launch("stopped", *same_rate, total, "checkpoint.every=100")
    assert resumed_from(again) == f"step_{marker['step']:08d}"
    whole = launch("not-stopped", *same_rate, total, "checkpoint.every=100")
    assert [again.losses[marker["step"] + i] for i in (1, 2)] == [whole.losses[marker["step"] + i] for i in (1, 2)]
