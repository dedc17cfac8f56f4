"""Real launches with Muon: every ZeRO stage beside one process, killed and resumed, moved, and its refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fbitrain.checkpoint_files import load_weights
from tests.launch.run_folders import copy_run

pytestmark = pytest.mark.launch
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
MUON = ("optim.optimizer=muon", "optim.muon.lr=0.02", "optim.muon.ns_steps=3", "optim.lr_factor.scales=0.1")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def alone(launch: Any) -> Any:
    """Six steps of one process that ZeRO does not touch: stage 0."""
    return launch("alone", *MUON, "engine.zero_stage=0", ranks=1)


@pytest.mark.parametrize("stage", [pytest.param(0, marks=slow), 1, pytest.param(2, marks=slow), 3])
def test_two_ranks_at_every_stage_update_as_one_process(launch: Any, alone: Any, stage: int) -> None:
    run = launch(f"stage{stage}", *MUON, f"engine.zero_stage={stage}")
    assert run.losses == pytest.approx(alone.losses, rel=2e-4)
    found, wanted = (load_weights(each.run_dir / "checkpoints" / "step_00000006") for each in (run, alone))
    for name, weight in wanted.items():
        assert (found[name] - weight).norm() < 2e-3 * weight.norm(), name


@pytest.mark.parametrize("stage", [pytest.param(1, marks=slow), 3])
def test_muon_is_not_silently_off(launch: Any, stage: int) -> None:
    """Two steps apart, a matrix differs by two orthogonal matrices: its spectral norm is bounded, and reached.

    AdamW's two steps would be three times as large in this norm.
    """
    quiet = ("eval.every=0", "checkpoint.every=1", "train.total_steps=2", "optim.warmup_steps=0", "optim.min_lr=5e-3")
    run = launch(f"orthogonal{stage}", *MUON, *quiet, f"engine.zero_stage={stage}")
    before, after = (load_weights(run.run_dir / "checkpoints" / f"step_0000000{step}") for step in (1, 2))
    matrices = [name for name in before if name.endswith("_proj.weight")]
    assert len(matrices) == 14
    for name in matrices:
        change = (after[name] - before[name]).double()
        size = 0.02 * math.sqrt(max(1, change.shape[0] / change.shape[1]))
        assert 0.6 * size < torch.linalg.matrix_norm(change, 2) < 1.3 * size, name


def test_paddings_of_stage_3_are_in_no_norm(launch: Any) -> None:
    """Rank 1's share of an α of one element is padding, which deterministic torch fills with NaN."""
    one_scale = ("binarize.scale=tensor", "binarize.beta=false", "engine.zero_stage=3", "debug.deterministic=true")
    run = launch("padded", *MUON, *one_scale, "train.total_steps=2", "checkpoint.every=2", "eval.every=0")
    for line in run.metrics:
        for name, value in line.items():
            assert math.isfinite(value), name


@pytest.mark.parametrize("stage", [1, pytest.param(0, marks=slow), pytest.param(2, marks=slow), 3])
def test_three_steps_kill_and_the_rest_are_the_same_run(launch: Any, stage: int) -> None:
    stage_key = (f"engine.zero_stage={stage}",)
    whole = launch(f"whole{stage}", *MUON, *stage_key)
    launch(f"killed{stage}", *MUON, *stage_key, env={"FAULT": "kill_at_step_4"}, script=FAULTS, expect=None)
    again = launch(f"killed{stage}", *MUON, *stage_key)
    assert "resumed from" in again.output
    assert again.losses == whole.losses


@pytest.mark.parametrize(
    ("stage", "ranks"), [(3, 2), *(pytest.param(*more, marks=slow) for more in ((0, 2), (1, 4), (2, 2), (3, 1)))]
)
def test_resumes_on_other_stages_and_ranks(launch: Any, alone: Any, stage: int, ranks: int) -> None:
    name = f"moved-{stage}-{ranks}"
    copy_run(alone.run_dir, launch.runs / name, step=3)
    run = launch(name, *MUON, f"engine.zero_stage={stage}", ranks=ranks)
    assert run.losses == pytest.approx(alone.losses, rel=3e-4)


@pytest.mark.parametrize("stage", [2, pytest.param(1, marks=slow), pytest.param(3, marks=slow)])
def test_offload_in_bf16_with_accumulation_and_clipping(launch: Any, stage: int) -> None:
    """What lies in host memory is updated as what lies on the device."""
    common = (*MUON, "engine.precision=bf16", f"engine.zero_stage={stage}", "optim.max_grad_norm=0.1")
    here = launch(f"here{stage}", *common)
    offloaded = launch(f"offloaded{stage}", *common, "engine.offload_optimizer=true")
    assert offloaded.losses == pytest.approx(here.losses, rel=2e-3)


def test_a_change_of_optimizer_is_refused_or_starts_anew_by_name(launch: Any, alone: Any) -> None:
    copy_run(alone.run_dir, launch.runs / "changed", step=3)
    refused = launch("changed", "engine.zero_stage=1", expect=1)
    assert "was written by another optimizer and holds no state of this one for 14 parameters" in refused.output
    assert "optim.on_change=restart" in refused.output
    run = launch("changed", "engine.zero_stage=1", "optim.on_change=restart")
    assert "begins anew: another optimizer wrote the checkpoint" in run.output
    assert "optim.optimizer 'muon' -> 'adamw'" in run.output
    trainer = json.loads((run.run_dir / "checkpoints" / "step_00000006" / "trainer.json").read_text())
    assert trainer["state_starts"] == {"matrices": 3}, "AdamW counts its steps from where its moments began"
    # From now on the checkpoints are this optimizer's: the switch is not needed any more.
    longer = launch("changed", "engine.zero_stage=1", "train.total_steps=7", "checkpoint.every=7")
    assert max(longer.losses) == 7


def test_logs_rates_and_updates_of_every_kind(alone: Any) -> None:
    last = [line for line in alone.metrics if "train/loss" in line][-1]
    assert last["lr/matrices"] == pytest.approx(0.02 * last["optim/lr"] / 5e-3)
    assert last["lr/scales"] == pytest.approx(0.1 * last["optim/lr"])
    for kind in ("matrices", "scales", "embeddings", "head", "norms"):
        assert 0 < last[f"update_ratio/{kind}"] < 1, kind
    assert (last["scales/negative"], last["scales/sign_changes"]) == (0, 0)


def test_fused_matrices_and_their_refusals(launch: Any, alone: Any) -> None:
    run = launch("fused", *MUON, "optim.muon.fused=[{name: q_proj, rows: [30, 30]}]", "engine.zero_stage=3")
    assert run.losses[1] == pytest.approx(alone.losses[1], rel=1e-5)
    assert run.losses[6] != pytest.approx(alone.losses[6], rel=1e-6)
    wrong = "optim.muon.fused=[{name: qkv, rows: [30, 30]}, {name: q_proj, rows: [30, 31]}]"
    refused = launch("unfused", *MUON, wrong, ranks=1, expect=1)
    assert "optim.muon.fused names 'qkv', and no Linear is called so" in refused.output
    assert "optim.muon.fused gives q_proj rows of 61 in all, and " in refused.output
    assert "Traceback" not in refused.output


def test_a_model_that_trains_no_matrices_is_refused(launch: Any) -> None:
    run = launch("no-matrices", *MUON, ranks=1, env={"FAULT": "freeze_matrices"}, script=FAULTS, expect=1)
    assert "optim.optimizer=muon updates matrices, and this model trains none" in run.output
    assert "Traceback" not in run.output
