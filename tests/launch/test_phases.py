"""Real launches of runs that begin in full precision and become binary: killed and resumed, on other ranks and stages.

Steps 1 and 2 are in full precision, 3 and 4 are mixed, 5 and 6 are binary, where a test does not say otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fbitrain.base.errors import UserError
from fbitrain.checkpoint_files import load_weights
from fbitrain.data.reading.heldout_text import load_heldout
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.inference.evaluate import perplexity
from fbitrain.loading.model_folder import load_lm
from fbitrain.model.binarize import init_scales
from fbitrain.releasing.release import release
from fbitrain.tensorboard_page import tag_of
from tests.launch.run_folders import copy_run

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
PHASES = ("binarize.from_step=2", "binarize.anneal_steps=2")
SWITCH = ("binarize.from_step=3", "checkpoint.every=3")  # at once, at the step of a checkpoint and of an evaluation
SCALES = (".alpha", ".beta")


@pytest.fixture(scope="module")
def reference(launch: Any) -> Any:
    """Six uninterrupted steps, stage 1, two ranks."""
    return launch("phases", *PHASES, "engine.zero_stage=1", "checkpoint.every=1")


@pytest.fixture(scope="module")
def switched(launch: Any) -> Any:
    """Three steps in full precision and three in binary, stage 1, two ranks."""
    return launch("switched", *SWITCH, "engine.zero_stage=1")


def weights_at(run: Any, step: int) -> dict[str, torch.Tensor]:
    return load_weights(run.run_dir / "checkpoints" / f"step_{step:08d}")


def test_logs_the_share_of_each_step(reference: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    wanted = {1: 0.0, 2: 0.0, 3: 1 / 3, 4: 2 / 3, 5: 1.0, 6: 1.0}
    found = {line["step"]: line["phase/binary_share"] for line in reference.metrics if "phase/binary_share" in line}
    assert found == wanted
    board = EventAccumulator(str(reference.run_dir / "tensorboard" / reference.run_dir.name)).Reload()
    shares = board.Scalars(tag_of("phase/binary_share"))
    assert {event.step: event.value for event in shares} == pytest.approx(wanted)


def test_scales_begin_where_the_weights_are_then(reference: Any) -> None:
    """Up to step 2 nothing trains them; step 3 begins at the values of those weights, and is AdamW's first for them."""
    before, then, after = (weights_at(reference, step) for step in (1, 2, 3))
    rate = next(line["optim/lr"] for line in reference.metrics if line["step"] == 3 and "optim/lr" in line)
    size = rate  # of AdamW's first update, whatever the gradient
    names = [name for name in then if name.endswith(SCALES)]
    assert len(names) == 2 * 7 * 2
    for name in names:
        assert torch.equal(before[name], then[name]), name
        layer, _, leaf = name.rpartition(".")
        alpha, beta = init_scales(then[f"{layer}.weight"], "column", True, 0)
        wanted = alpha if leaf == "alpha" else beta
        assert wanted is not None
        moved_by = (after[name] - wanted).abs()
        assert moved_by.max() <= 1.001 * size, name
        # eps holds it back where the gradient is tiny.
        assert moved_by.median().item() == pytest.approx(size, rel=1e-2), name
    weight = "model.layers.0.mlp.down_proj.weight"
    assert (then[weight] - before[weight]).abs().max() > 1e-3


def test_a_kill_between_the_phases_changes_nothing(launch: Any, reference: Any) -> None:
    """After step 3, whose share is 1/3; before it, scales were set from the weights."""
    run = launch.start("killed", *PHASES, "checkpoint.every=3", script=FAULTS, env={"FAULT": "kill_at_step_4"})
    run.wait()
    assert max(run.losses) == 3
    again = launch("killed", *PHASES, "checkpoint.every=3")
    assert again.losses == reference.losses
    for name, tensor in weights_at(reference, 6).items():
        assert torch.equal(weights_at(again, 6)[name], tensor), name


@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 5))])
def test_resumes_in_every_phase(launch: Any, reference: Any, step: int) -> None:
    copy_run(reference.run_dir, launch.runs / f"from{step}", step)
    run = launch(f"from{step}", *PHASES)
    assert run.losses == reference.losses


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(3, 2), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((0, 2), (2, 2), (2, 4), (3, 1), (0, 1)))],
)
def test_stages_and_ranks_agree(launch: Any, switched: Any, stage: int, ranks: int) -> None:
    """Where an evaluation comes right before the scales are set, which leaves parameters gathered under stage 3."""
    run = launch(f"stage{stage}-{ranks}", *SWITCH, f"engine.zero_stage={stage}", ranks=ranks)
    assert run.losses == pytest.approx(switched.losses, rel=3e-4)


@pytest.mark.parametrize(
    ("stage", "ranks"), [(3, 1), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((0, 1), (2, 4), (3, 2)))]
)
def test_binarization_begins_after_a_resume_elsewhere(launch: Any, switched: Any, stage: int, ranks: int) -> None:
    copy_run(switched.run_dir, launch.runs / f"moved{stage}-{ranks}", 3)
    run = launch(f"moved{stage}-{ranks}", *SWITCH, f"engine.zero_stage={stage}", ranks=ranks)
    assert run.losses == pytest.approx(switched.losses, rel=3e-4)


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (1, 2))])
def test_bf16_sets_masters_and_copies(launch: Any, switched: Any, stage: int) -> None:
    options = ("engine.precision=bf16", f"engine.zero_stage={stage}", f"engine.offload_optimizer={stage == 2}")
    run = launch(f"bf16-{stage}", *SWITCH, *options, "checkpoint.every=1")
    assert run.losses == pytest.approx(switched.losses, rel=2e-2)  # step 4's loss is that of the new scales' copies
    then, after = weights_at(run, 3), weights_at(run, 4)
    rate = next(line["optim/lr"] for line in run.metrics if line["step"] == 4 and "optim/lr" in line)
    size = rate  # of AdamW's first update
    for name in (name for name in then if name.endswith(".alpha")):
        alpha, _ = init_scales(then[name.replace("alpha", "weight")], "column", True, 0)
        assert (after[name] - alpha).abs().median().item() == pytest.approx(size, rel=1e-2), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixture_of_scales", "onebit", "ternary", "recu"])
def test_every_kind_of_layer_changes_over(launch: Any, method: str) -> None:
    runs = [
        launch(f"{method}{stage}", *PHASES, f"binarize.method={method}", f"engine.zero_stage={stage}", ranks=ranks)
        for stage, ranks in ((1, 2), (3, 1))
    ]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=3e-4)
    assert runs[0].losses[6] < runs[0].losses[1]


@pytest.mark.slow
def test_compiled_layers_learn_the_same(launch: Any, reference: Any) -> None:
    run = launch("compiled", *PHASES, "train.compile=true", "eval.every=0", ranks=1)
    assert run.losses == pytest.approx(reference.losses, rel=3e-4)


@pytest.mark.slow
def test_a_mix_from_the_first_step(launch: Any) -> None:
    run = launch("mixed", "binarize.anneal_steps=3")
    shares = [line["phase/binary_share"] for line in run.metrics if "phase/binary_share" in line]
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert run.losses[6] < run.losses[1] - 0.05


def test_a_release_scores_what_its_run_measured(reference: Any, switched: Any, workspace: Any, tmp_path: Path) -> None:
    """At step 3, where one run is mixed and the other in full precision; and at step 6, where both are binary."""
    tokenizer = load_tokenizer(str(workspace.teacher))
    text = load_heldout([str(workspace.path / "heldout.jsonl")], tokenizer)
    for run, step in ((reference, 3), (switched, 3), (reference, 6)):
        checkpoint = run.run_dir / "checkpoints" / f"step_{step:08d}"
        if step == 3:
            with pytest.raises(UserError, match=f"binary from step {5 if run is reference else 4} on, so there are no"):
                release(checkpoint, tmp_path / "none")
        out = tmp_path / f"{run.run_dir.name}-{step}"
        release(checkpoint, out, ["dense"], dtype="float32")
        found = perplexity(load_lm(out / "dense", torch.float32), text, 24, max_tokens=480)
        measured = {line["step"]: line for line in run.metrics if "heldout/perplexity" in line}[step]
        assert found.ppl == pytest.approx(measured["heldout/perplexity"], rel=1e-4), (run.run_dir.name, step)
        assert found.bits_per_byte == pytest.approx(measured["heldout/bits_per_byte"], rel=1e-4)


def test_fine_tuning_goes_on_from_a_run_in_full_precision(
    launch: Any, switched: Any, workspace: Any, tmp_path: Path
) -> None:
    """Its own phase in full precision begins where that run's checkpoint of step 3 was measured."""
    lines = workspace.config.read_text().splitlines()
    origin = switched.run_dir / "checkpoints" / "step_00000003"
    config = tmp_path / "finetune.yaml"
    config.write_text("\n".join(f"model: {{pretrained: {origin}}}" if "model:" in line else line for line in lines))
    finetune: Any = {"script": ROOT / "launch" / "finetune.py", "config": config}
    run = launch("tuned", *PHASES, "binarize.method=xnor", **finetune)
    found, measured = (
        {line["step"]: line["heldout/perplexity"] for line in run.metrics if "heldout/perplexity" in line}
        for run in (run, switched)
    )
    assert found[0] == pytest.approx(measured[3], rel=1e-5)
    assert [line["phase/binary_share"] for line in run.metrics if "phase/binary_share" in line][4:] == [1.0, 1.0]
    refused = launch("twice", *PHASES, f"model.pretrained={switched.run_dir}", expect=1, **finetune)
    assert "is binary already; set binarize.from_step=0 and binarize.anneal_steps=0" in refused.output


def test_a_full_precision_run_may_decide_later(launch: Any, switched: Any) -> None:
    copy_run(switched.run_dir, launch.runs / "later", 3)
    run = launch("later", "binarize.from_step=4", "binarize.anneal_steps=1")
    assert "binarize.from_step 3 -> 4" in run.output
    shares = {line["step"]: line["phase/binary_share"] for line in run.metrics if "phase/binary_share" in line}
    assert shares == {1: 0, 2: 0, 3: 0, 4: 0, 5: 0.5, 6: 1}
    refused = launch("later", "binarize.from_step=3", "train.total_steps=7", expect=1)
    said = [line for line in refused.output.splitlines() if line.startswith("fbitrain pretrain: ")]
    assert len(said) == 1
    assert "binarize.from_step (4 there, 3 here)" in said[0]
    assert "they may change only before binarization begins" in said[0]


def test_impossible_phases_are_one_message(launch: Any) -> None:
    run = launch("bad", "binarize.from_step=-1", "binarize.anneal_steps=9", expect=1)
    assert "binarize.from_step=-1 must not be negative" in run.output
    assert "binarize.anneal_steps=9 end after train.total_steps=6" in run.output
    assert "Traceback" not in run.output
