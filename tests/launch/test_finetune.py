"""Real launches of fine-tuning: what pretraining promises of runs, kept for models that were loaded and binarized.

A run that was killed and resumed, also on another ZeRO stage, is the run that was not; a mode that cannot be is one
sentence.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fbitrain import resume
from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.checkpoint_files import fixed_tensors, load_weights
from fbitrain.commands import finetune as finetune_command
from fbitrain.commands import pretrain
from fbitrain.config import ConfigError, load_config, to_yaml
from fbitrain.model import method_table
from tests.launch.run_folders import copy_run

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]
FINETUNE = ROOT / "launch" / "finetune.py"
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
PARTIAL = (
    *("binarize.method=partial", "binarize.scale=row", "binarize.beta=false", "binarize.salient.criterion=hessian"),
    *("calibration.n_sequences=4", "calibration.seq_len=16"),
)
MOS = ("binarize.method=mixture_of_scales", "binarize.n_experts=3", "distill.hidden_weight=10")
CHERRY = (
    *("binarize.method=cherry", "binarize.scale=row", "binarize.beta=false", "binarize.salient.dtype=float16"),
    *("binarize.salient.criterion=fisher", "calibration.n_sequences=4", "calibration.seq_len=16"),
)
METHODS = {
    **{name: (f"binarize.method={name}",) for name, method in method_table.METHODS.items() if not method.salient},
    **{"cherry": CHERRY, "cherry_3_bits": (*CHERRY, "binarize.bits=3"), "mos": MOS},
    "partial_fp16": (*PARTIAL, "binarize.salient.dtype=float16"),
    "partial_ptq": (*PARTIAL, "calibration.ptq=true"),
}
SHORT = ("train.total_steps=4", "checkpoint.every=2", "eval.every=4", "eval.prompts=[]")


@pytest.fixture(scope="module")
def config(workspace: Any) -> Path:
    """The workspace's, but the student is its teacher made binary."""
    text = "".join(
        f"model: {{pretrained: {workspace.teacher}}}\n" if line.startswith("model:") else line
        for line in workspace.config.read_text().splitlines(keepends=True)
        if not line.startswith("distill:")
    )
    path: Path = workspace.path / "finetune.yaml"
    path.write_text(text + "distill: {chunk_tokens: 20}\n")
    return path


@pytest.fixture(scope="module")
def finetune(launch: Any, config: Path) -> Any:
    def start(name: str, *overrides: str, **options: Any) -> Any:
        return launch(name, *overrides, config=config, script=FINETUNE, **options)

    return start


@pytest.fixture(scope="module")
def partial(finetune: Any) -> Any:
    """PB-LLM for four steps under ZeRO-3, with checkpoints of steps 0, 2 and 4."""
    return finetune("partial", *PARTIAL, *SHORT, "engine.zero_stage=3")


def test_a_partially_binary_model_is_trained_and_leaves_what_a_run_promises(partial: Any) -> None:
    assert partial.losses[4] < partial.losses[1]
    assert "bits each" in partial.output
    first = partial.metrics[0]
    assert 1 < first["model/bits_per_weight"] < 16
    assert [line["step"] for line in partial.metrics if "heldout/perplexity" in line] == [0, 4]
    steps = sorted(path.name for path in (partial.run_dir / "checkpoints").iterdir())
    assert steps == ["step_00000000", "step_00000002", "step_00000004"]


def test_masks_and_frozen_weights_stay_what_calibration_made_them(partial: Any) -> None:
    start, end = (fixed_tensors(partial.run_dir / "checkpoints" / f"step_0000000{step}") for step in (0, 4))
    assert {name.rpartition(".")[2] for name in start} == {"salient_bits", "salient_values", "salient_scale"}
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in start)
    before, after = (load_weights(partial.run_dir / "checkpoints" / f"step_0000000{step}") for step in (0, 4))
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


def test_under_zero_3_the_rest_of_a_run_is_the_same_run(finetune: Any, launch: Any, partial: Any) -> None:
    copy_run(partial.run_dir, launch.runs / "partial-resumed", 2)
    again = finetune("partial-resumed", *PARTIAL, *SHORT, "engine.zero_stage=3")
    assert "resumed from" in again.output
    assert again.losses == partial.losses


def test_what_calibration_found_is_never_found_anew(launch: Any, config: Path, partial: Any) -> None:
    """Where calibrating is deadly, and on one rank under another stage, the run goes on from step 0."""
    fault: Any = {"script": FAULTS, "env": {"FAULT": "without_calibration", "COMMAND": "finetune"}, "ranks": 1}
    copy_run(partial.run_dir, launch.runs / "partial-moved", 0)
    again = launch("partial-moved", *PARTIAL, *SHORT, "engine.zero_stage=1", config=config, **fault)
    assert again.losses == pytest.approx(partial.losses, rel=3e-4)
    start = fixed_tensors(partial.run_dir / "checkpoints" / "step_00000000")
    end = fixed_tensors(again.run_dir / "checkpoints" / "step_00000004")
    assert all(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.parametrize("key", ["method=cherry", "salient.fraction=0.2", "salient.criterion=magnitude"])
def test_another_mode_or_selection_is_refused(partial: Any, config: Path, key: str) -> None:
    dtype = ("binarize.salient.dtype=float16",) if key == "method=cherry" else ()
    other = load_config(config, [*PARTIAL, *SHORT, f"binarize.{key}", *dtype], world_size=2)
    with pytest.raises(UserError, match=f"belongs to another configuration: .*{key.partition('=')[0]} .* there"):
        resume.require_same_config(partial.run_dir / "checkpoints" / "step_00000004", other)


@pytest.mark.slow
def test_a_killed_mixture_of_scales_resumes_as_the_run_that_was_not(finetune: Any, launch: Any, config: Path) -> None:
    whole = finetune("mos", *MOS)
    last = [line for line in whole.metrics if "train/loss" in line][-1]
    assert last["train/hidden_mse"] > 0
    assert 0 < last["router/entropy"] <= math.log(3) + 1e-6
    assert sum(last[f"router/load_{i}"] for i in range(3)) == pytest.approx(1, rel=1e-5)
    fault = {"FAULT": "kill_at_step_4", "COMMAND": "finetune"}
    killed = launch.start("mos-killed", *MOS, config=config, script=FAULTS, env=fault)
    assert killed.wait() != 0
    assert max(killed.losses) == 3
    again = finetune("mos-killed", *MOS)
    assert again.losses == whole.losses


def test_ptq_is_a_run_of_no_steps(finetune: Any) -> None:
    run = finetune("ptq", *PARTIAL, "calibration.ptq=true", "train.total_steps=0", ranks=1)
    assert [line["step"] for line in run.metrics if "heldout/perplexity" in line] == [0]
    assert (run.run_dir / "checkpoints" / "step_00000000" / "COMPLETE.json").is_file()
    assert (run.run_dir / "FINISHED.json").is_file()


@pytest.mark.slow
def test_a_binary_run_is_continued_and_a_binary_model_made_nothing_else(
    finetune: Any, launch: Any, workspace: Any
) -> None:
    first = launch("pretrained")
    pretrained = (f"model.pretrained={first.run_dir}",)
    run = finetune("continued", *pretrained, "eval.every=3")
    assert max(run.losses) == 6
    ends = [line["heldout/perplexity"] for line in first.metrics if "heldout/perplexity" in line]
    starts = [line["heldout/perplexity"] for line in run.metrics if "heldout/perplexity" in line]
    assert starts[0] == pytest.approx(ends[-1], rel=1e-5)
    refused = finetune("other", *pretrained, "binarize.method=onebit", expect=1)
    assert "is binary already (binarize.method=binary) and is continued as it is" in refused.output


FROZEN = ("train.frozen=[embeddings, norms, head]",)
MUON_FROZEN = (*FROZEN, "optim.optimizer=muon", "optim.decay_factor.matrices=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "then", "overrides"),
    [
        (3, 3, FROZEN),
        (3, 1, MUON_FROZEN),
        (1, 3, FROZEN),
        (2, 0, FROZEN),
        (0, 2, MUON_FROZEN),
        (1, 1, (*FROZEN, "engine.precision=bf16")),
    ],
)
def test_frozen_parameters_stay_as_they_were(
    finetune: Any, launch: Any, workspace: Any, stage: int, then: int, overrides: tuple[str, ...]
) -> None:
    """Whole in the checkpoint under every stage, in fp32 and in no optimizer, and the rest of a run is the same run."""
    case = f"frozen-{stage}-{then}-{len(overrides)}"
    whole = finetune(case, *SHORT, *overrides, f"engine.zero_stage={stage}")
    assert "; frozen: " in whole.output
    loaded = load_file(workspace.teacher / "model.safetensors")
    names = {name for name in loaded if "proj" not in name}
    for step in (2, 4):
        folder = whole.run_dir / "checkpoints" / f"step_0000000{step}"
        assert fixed_tensors(folder).keys() == names
        assert all(torch.equal(load_weights(folder)[name], loaded[name].float()) for name in names)
        assert names.isdisjoint(json.loads((folder / "trainer.json").read_text())["shapes"])
    copy_run(whole.run_dir, launch.runs / f"{case}-moved", 2)
    moved = finetune(f"{case}-moved", *SHORT, *overrides, f"engine.zero_stage={then}")
    assert moved.losses == (whole.losses if stage == then else pytest.approx(whole.losses, rel=3e-4))


def test_what_is_frozen_is_decided_once(config: Path) -> None:
    """Another choice has no optimizer state in the checkpoint: the run is refused, before anything is loaded."""
    problems = [["train.frozen=[matrices]"], ["train.frozen=[norms]", "model.pretrained=''", "model.preset=tiny"]]
    for overrides, words in zip(problems, ("'matrices', which cannot be frozen", "keeps what a trained"), strict=True):
        with pytest.raises(ConfigError, match=words):
            load_config(config, overrides, world_size=2)
    folder = config.parent / "frozen_checkpoint"
    folder.mkdir()
    frozen = load_config(config, [*FROZEN], world_size=2)
    (folder / "config.yaml").write_text(to_yaml(frozen))
    (folder / "trainer.json").write_text('{"step": 2, "world_size": 2}')
    assert resume.require_same_config(folder, frozen) == ""
    with pytest.raises(UserError, match=r"train.frozen .* there, "):
        resume.require_same_config(folder, load_config(config, world_size=2))


@pytest.mark.slow
def test_in_bf16_frozen_weights_keep_their_digits(finetune: Any, partial: Any) -> None:
    run = finetune("bf16", *PARTIAL, *SHORT, "engine.precision=bf16", "train.activation_checkpointing=true")
    assert run.losses[1] == pytest.approx(partial.losses[1], rel=2e-2)
    start, end = (fixed_tensors(r.run_dir / "checkpoints" / f"step_0000000{s}") for r, s in ((partial, 0), (run, 4)))
    assert all(torch.equal(start[name], end[name]) for name in start)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_every_method_trains_and_resumes(config: Path, tmp_path: Path, stage: int) -> None:
    def run_all(suffix: str) -> dict[str, list[float]]:
        """The losses of every method's run; a run goes on from the checkpoints that it finds."""
        fixed = (*SHORT, f"run.dir={tmp_path}", f"engine.zero_stage={stage}", "train.global_batch_tokens=96")
        runs = [[f"run.name={name}{suffix}", *options, *fixed] for name, options in METHODS.items()]
        command = [sys.executable, str(FAULTS.with_name("many_runs.py")), str(config)]
        done = subprocess.run(command, input=json.dumps(runs), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("resumed from") == (len(METHODS) if suffix else 0)
        return {name: losses(tmp_path / f"{name}{suffix}") for name in METHODS}

    def losses(run_dir: Path) -> list[float]:
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        return [line["train/loss"] for line in lines if "train/loss" in line]

    whole = run_all("")
    assert all(len(found) == 4 for found in whole.values())
    for name in METHODS:
        copy_run(tmp_path / name, tmp_path / f"{name}-resumed", 2)
    assert run_all("-resumed") == whole


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("binarize.salient.fraction=1.5",), "binarize.salient.fraction=1.5 must lie between 0 and 1"),
        (("model.pretrained=/nowhere/model",), "model.pretrained=/nowhere/model does not exist"),
        (("model.pretrained=''",), "name one in model.pretrained and start it with fbitrain finetune"),
        (("data.seq_len=4096",), "data.seq_len=4096 is longer than model.max_seq_len=2048"),
        (("model.vocab_size=77",), "model.vocab_size=77 contradicts model.pretrained="),
        (("binarize.method=onebit", "calibration.ptq=true"), "calibration.ptq is GPTQ-PB"),
    ],
)
def test_bad_settings_are_said_before_anything_is_loaded(
    config: Path, overrides: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(finetune_command.main, finetune_command.parser(), [str(config), *PARTIAL, *overrides]) == 1
    said = capsys.readouterr().err
    assert said.startswith("fbitrain finetune: ")
    assert sentence in said


def test_no_feedback_is_short_for_its_setting(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feedback = []
    monkeypatch.setattr("fbitrain.train.train", lambda config: feedback.append(config.calibration.feedback))
    for arguments in ([], ["--no-feedback"]):
        command = [str(config), *PARTIAL, "calibration.ptq=true", *arguments]
        assert run(finetune_command.main, finetune_command.parser(), command) == 0
    assert feedback == [True, False]


def test_each_command_names_the_other(workspace: Any, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pretrain.main, pretrain.parser(), [str(config)]) == 1
    assert "start it with fbitrain finetune" in capsys.readouterr().err
    assert run(finetune_command.main, finetune_command.parser(), [str(workspace.config)]) == 1
    assert "model.pretrained is empty; name the model to start from" in capsys.readouterr().err
