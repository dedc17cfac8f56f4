"""Real launches in which a rank hangs, stops or is slow: the others say which, and a hang ends the run in time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
SHORT = ("train.collective_timeout_s=4", "checkpoint.every=100", "eval.every=0")


def said(run: Any) -> str:
    """What is said of the hang, once and by one rank."""
    first, second = [line for line in run.output.splitlines() if line.startswith("fbitrain: ")]
    # More than 4 s where the first steps were slow: on a busy machine.
    assert re.match(r"fbitrain: nothing has moved for [0-9]+ s: rank 1 \(process ", first)
    assert first.endswith("start the same command again to go on from the last checkpoint")
    return f"{first}\n{second}"


def test_a_rank_whose_data_hangs_is_named_with_its_stack(launch: Any) -> None:
    run = launch("data", *SHORT, script=FAULTS, env={"FAULT": "hang_in_data_on_rank_1"}, expect=1)
    hung, ended = ((run.run_dir / name).stat().st_mtime for name in ("pipe", "LOST.json"))
    assert ended - hung < 30
    words = said(run)
    assert ") hangs, and the other ranks wait; " in words
    assert "rank 1: data in micro-batch 1 of 4 of step 4, after collective " in words
    assert ", at train.py:" in words
    hangs = run.run_dir / "hangs"
    files = {f"step_4{kind}" for r in (0, 1) for kind in (f"_rank_{r}.txt", f"_collectives_rank_{r}")}
    assert {path.name for path in hangs.iterdir()} == files
    assert "in hanging" in (hangs / "step_4_rank_1.txt").read_text()
    assert "in drops_step" in (hangs / "step_4_rank_0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_process_that_is_stopped_is_named_by_the_others(launch: Any, stage: int) -> None:
    options = (*SHORT, f"engine.zero_stage={stage}")
    run = launch(f"stopped{stage}", *options, script=FAULTS, env={"FAULT": "stop_rank_1_at_step_4"}, expect=1)
    words = said(run)
    assert ") does not answer (state of the process: T (stopped)), and the other ranks wait; " in words
    assert "; rank 1: last seen " in words
    assert [path.name for path in (run.run_dir / "hangs").glob("*.txt")] == ["step_4_rank_0.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_slow_rank_is_told_from_those_that_wait(launch: Any, stage: int) -> None:
    options = ("metrics.every=3", "checkpoint.every=100", "eval.every=0", "debug.profile_steps=[4,5]")
    run = launch(
        f"slow{stage}",
        *options,
        f"engine.zero_stage={stage}",
        script=FAULTS,
        env={"FAULT": "slow_forward_on_rank_1"},
    )
    for line in (line for line in run.metrics if "train/loss" in line):
        assert line["slowest_rank/number"] == 1
        assert line["fastest_rank/number"] == 0
        slept = 1.2  # in four micro-batches
        assert line["slowest_rank/forward_s"] > slept > line["fastest_rank/forward_s"]
        assert line["fastest_rank/waiting_s"] > line["slowest_rank/waiting_s"] + slept / 2
    assert "longer than the median rank: " in run.output
    assert "most of the difference in forward" in run.output
    profiles = {path.name for path in (run.run_dir / "profile").iterdir()}
    assert profiles == {f"steps_4_to_5_rank_{rank}.json" for rank in (0, 1)}
