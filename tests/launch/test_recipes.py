"""Optimizers, schedules and phases of precision together: killed and resumed, moved to other ranks; cooldowns."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.launch.run_folders import copy_run

pytestmark = pytest.mark.launch
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
OPTIMIZERS = {
    "adamw": ("optim.lr_factor.scales=0.1",),
    "muon": ("optim.optimizer=muon", "optim.muon.lr=0.02", "optim.lr_factor.scales=0.1"),
}
SCHEDULES = {
    "cosine": (),
    "linear": ("optim.schedule=linear", "optim.min_lr=0"),
    "wsd": ("optim.schedule=wsd", "optim.cooldown_steps=3"),
    "two_stage": ("optim.schedule=two_stage", "optim.stage2_step=5", "optim.stage2_lr=1e-3"),
}
PHASES = ("binarize.from_step=2", "binarize.anneal_steps=2")  # binary from step 5 on: the kill is in the mixed steps
FAST = {("muon", "wsd", 3)}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(OPTIMIZERS, SCHEDULES, (0, 1, 2, 3))
]


@pytest.mark.parametrize(("optimizer", "schedule", "stage"), CASES)
def test_killed_or_moved_it_is_the_same_run(launch: Any, optimizer: str, schedule: str, stage: int) -> None:
    recipe = (*OPTIMIZERS[optimizer], *SCHEDULES[schedule], *PHASES, f"engine.zero_stage={stage}")
    name = f"{optimizer}-{schedule}-{stage}"
    whole = launch(name, *recipe)
    assert [line["phase/binary_share"] for line in whole.metrics if "train/loss" in line] == pytest.approx(
        [0, 0, 1 / 3, 2 / 3, 1, 1]
    )
    launch(f"{name}-killed", *recipe, env={"FAULT": "kill_at_step_4"}, script=FAULTS, expect=None)
    copy_run(launch.runs / f"{name}-killed", launch.runs / f"{name}-moved")
    again = launch(f"{name}-killed", *recipe)
    assert again.losses == whole.losses
    moved = launch(f"{name}-moved", *recipe, ranks=1)
    assert moved.losses == pytest.approx(whole.losses, rel=3e-4)


@pytest.mark.slow
def test_a_cooldown_starts_from_any_checkpoint_in_a_run_of_its_own(launch: Any) -> None:
    stable = ("optim.schedule=wsd", "train.total_steps=1000", "optim.min_lr=0", "checkpoint.every=1")
    trunk = launch("trunk", *stable, env={"FAULT": "kill_at_step_4"}, script=FAULTS, expect=None)
    assert max(trunk.losses) == 3
    resume_from = trunk.run_dir / "checkpoints" / "step_00000002"
    cooled = launch(
        "cooled", "optim.schedule=wsd", "optim.min_lr=0", f"train.resume={resume_from}", "train.total_steps=6",
        "optim.cooldown_steps=4",
    )  # fmt: skip
    rates = {line["step"]: line["optim/lr"] for line in cooled.metrics if "train/loss" in line}
    assert rates == pytest.approx({3: 5e-3 * 0.75, 4: 5e-3 * 0.5, 5: 5e-3 * 0.25, 6: 0})
    assert f"resumed from {resume_from}" in cooled.output
    assert (cooled.run_dir / "FINISHED.json").is_file()
    assert (trunk.run_dir / "checkpoints" / "step_00000003").is_dir()


def test_a_phase_or_a_cooldown_outside_the_run_is_one_sentence(launch: Any) -> None:
    wrong = ("binarize.from_step=5", "binarize.anneal_steps=2", "optim.schedule=wsd", "optim.cooldown_steps=7")
    run = launch("outside", *wrong, "optim.optimizer=sgd", ranks=1, expect=1)
    assert "optim.optimizer='sgd' is unknown; choose one of adamw, muon" in run.output
    assert "optim.cooldown_steps=7 must lie in 0 to train.total_steps=6" in run.output
    assert "binarize.from_step=5" in run.output
    assert "Traceback" not in run.output
