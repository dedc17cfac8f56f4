"""What checkpoints of runs with phases of precision become: releases, model cards, a start for fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.checkpoint_marker import write_marker
from fbitrain.commands import release as command
from fbitrain.config import ConfigError, DistillConfig, load_config, to_yaml
from fbitrain.loading.model_folder import load_lm
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.latent import LatentLinear
from fbitrain.model.phases import binary_share
from fbitrain.releasing.release import release
from tests.core.test_fine_tune import config_for, logits, saved, start, write_checkpoint
from tests.core.test_student import gpt2, llama

STEP = 3  # of the checkpoints that write_checkpoint writes
FULL, MIXED, DONE = (3, 2), (2, 2), (1, 1)  # from_step and anneal_steps


def phased(phases: tuple[int, int], **fields: Any) -> BinarizeConfig:
    return BinarizeConfig(from_step=phases[0], anneal_steps=phases[1], **fields)


def checkpointed(run_dir: Path, pretrained: Path, how: BinarizeConfig, teacher: Path) -> PreTrainedModel:
    """A run whose weights and scales moved apart, as its loop evaluates it after STEP steps."""
    config = replace(config_for(pretrained, how), distill=DistillConfig(teacher=str(teacher)))
    lm = start(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    for module in lm.modules():
        if isinstance(module, LatentLinear):
            module.set_binary_share(binary_share(how, STEP))
    write_checkpoint(run_dir, lm, config)
    return lm


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("phases", [FULL, MIXED])
@pytest.mark.parametrize("method", ["binary", "onebit", "recu"])
def test_dense_is_what_the_model_computes(
    make: Any, phases: tuple[int, int], method: str, tmp_path: Path, workspace: Any
) -> None:
    how = phased(phases, method=method)
    lm = checkpointed(tmp_path / "run", saved(make, tmp_path / "model"), how, workspace.teacher)
    release(tmp_path / "run", tmp_path / "out", ["dense"], dtype="float32")
    dense, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(logits(dense), logits(lm), rtol=1e-4, atol=1e-5)


def test_a_mixture_of_scales_has_dense_weights_in_full_precision_only(tmp_path: Path, workspace: Any) -> None:
    how = phased(FULL, method="mixture_of_scales")
    lm = checkpointed(tmp_path / "full", workspace.teacher, how, workspace.teacher)
    release(tmp_path / "full", tmp_path / "out", ["dense"], dtype="float32")
    torch.testing.assert_close(logits(load_lm(tmp_path / "out" / "dense", torch.float32)), logits(lm))
    checkpointed(tmp_path / "mixed", workspace.teacher, phased(MIXED, method="mixture_of_scales"), workspace.teacher)
    with pytest.raises(UserError, match=r"share of 33.3% after step 3, .* has no fixed weights to mix"):
        release(tmp_path / "mixed", tmp_path / "none", ["dense"])


@pytest.mark.parametrize(
    ("fields", "formats", "names"),
    [
        ({}, ["dense", "packed"], "packed"),
        ({"method": "ternary"}, ["gguf"], "gguf"),
        ({"scale": "group", "beta": False}, ["packed", "gguf"], "packed or gguf"),
    ],
)
def test_bits_are_refused_with_the_step_of_the_first(
    fields: dict[str, Any], formats: list[str], names: str, tmp_path: Path, workspace: Any
) -> None:
    for phases, kind in ((FULL, "in full precision"), (MIXED, "mixed with a binary share of 33.3%")):
        run_dir = tmp_path / kind
        checkpointed(run_dir, workspace.teacher, phased(phases), workspace.teacher)
        config = load_config(run_dir / "config.yaml")
        # The weights are not looked at: these would be too narrow for groups of 128.
        said_there = to_yaml(replace(config, binarize=phased(phases, **fields)))
        checkpoint = run_dir / "checkpoints" / "step_00000003"
        (checkpoint / "config.yaml").write_text(said_there)
        write_marker(checkpoint, 3)
        said = f"is {kind} after step 3, binary from step {sum(phases) + 1} on, so there are no bits to write"
        with pytest.raises(UserError, match=f"{said} as {names}; release it as dense only"):
            release(run_dir, tmp_path / "out", formats)
    assert not (tmp_path / "out").exists()


def test_gguf_in_fp16_and_the_printed_line(tmp_path: Path, workspace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lm = checkpointed(tmp_path / "run", workspace.teacher, phased(FULL), workspace.teacher)
    arguments = [str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--format", "dense,gguf"]
    assert run(command.main, command.parser(), arguments) == 0
    said = capsys.readouterr().out
    assert "step_00000003: in full precision after step 3, binary from step 6 on\n" in said
    dense = load_lm(tmp_path / "out" / "dense", torch.float32)
    torch.testing.assert_close(logits(dense), logits(lm), rtol=0, atol=2e-2)
    assert list((tmp_path / "out" / "gguf").glob("*-F16.gguf"))


@pytest.mark.parametrize(
    ("phases", "words", "absent"),
    [
        (
            FULL,
            ["A full-precision language model, from a run before its weights become 1-bit", "full-precision"],
            "α·sign",
        ),
        (
            MIXED,
            ["between full precision and 1-bit weights", "| phases | mixed with a binary share of 33.3%"],
            "1-bit,",
        ),
        (
            DONE,
            ["with 1-bit weights", "| phases | steps in full precision: 1, mixed: 1, then binary |"],
            "full-precision",
        ),
    ],
)
def test_the_card_tells_the_phase(
    phases: tuple[int, int], words: list[str], absent: str, tmp_path: Path, workspace: Any
) -> None:
    checkpointed(tmp_path / "run", workspace.teacher, phased(phases), workspace.teacher)
    release(tmp_path / "run", tmp_path / "out", ["dense"])
    card = (tmp_path / "out" / "README.md").read_text()
    for part in words:
        assert part in card, part
    assert absent not in card


def test_a_run_that_became_binary_is_released_as_one(tmp_path: Path, workspace: Any) -> None:
    lm = checkpointed(tmp_path / "run", workspace.teacher, phased(DONE), workspace.teacher)
    release(tmp_path / "run", tmp_path / "out", dtype="float32")
    for name in ("dense", "packed"):
        model = load_lm(tmp_path / "out" / name, torch.float32)
        torch.testing.assert_close(logits(model), logits(lm), rtol=1e-4, atol=1e-4)


# A start for fine-tuning


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_run_still_in_full_precision_is_binarized_anew(make: Any, tmp_path: Path, workspace: Any) -> None:
    """Its scales, which nothing has trained, count for nothing; its weights do."""
    lm = checkpointed(
        tmp_path / "run",
        saved(make, tmp_path / "model"),
        phased(FULL),
        workspace.teacher,
    )
    release(tmp_path / "run", tmp_path / "out", ["dense"], dtype="float32")
    assert torch.equal(logits(start(config_for(tmp_path / "run", BinarizeConfig(enabled=False)))), logits(lm))
    for how in (BinarizeConfig(), BinarizeConfig(method="xnor"), BinarizeConfig(from_step=2)):
        found = logits(start(config_for(tmp_path / "run", how)))
        torch.testing.assert_close(found, logits(start(config_for(tmp_path / "out" / "dense", how))))


def test_a_run_between_the_precisions_is_no_start(tmp_path: Path, workspace: Any) -> None:
    checkpointed(tmp_path / "run", workspace.teacher, phased(MIXED), workspace.teacher)
    said = r"is mixed with a binary share of 33.3% after step 3, binary from step 5 on; name a checkpoint from before"
    for how in (BinarizeConfig(), BinarizeConfig(method="onebit"), BinarizeConfig(enabled=False)):
        with pytest.raises(UserError, match=said):
            start(config_for(tmp_path / "run", how))


def test_a_run_that_became_binary_goes_on_as_it_is(tmp_path: Path, workspace: Any) -> None:
    lm = checkpointed(tmp_path / "run", workspace.teacher, phased(DONE), workspace.teacher)
    assert torch.equal(logits(start(config_for(tmp_path / "run"))), logits(lm))
    with pytest.raises(UserError, match=r"is binary already .binarize.method=binary."):
        start(config_for(tmp_path / "run", BinarizeConfig(method="onebit")))
    with pytest.raises(UserError, match=r"is binary already; set binarize.from_step=0 and binarize.anneal_steps=0"):
        start(config_for(tmp_path / "run", BinarizeConfig(from_step=2)))


def test_phases_and_a_run_that_is_binary_throughout_exclude_each_other(tmp_path: Path, workspace: Any) -> None:
    config = config_for(workspace.teacher)
    write_checkpoint(tmp_path / "run", start(config), config)
    text = "\n".join(line for line in workspace.config.read_text().splitlines() if not line.startswith("model:"))
    (tmp_path / "tuned.yaml").write_text(f"model: {{pretrained: {tmp_path / 'run'}}}\n{text}")
    load_config(tmp_path / "tuned.yaml")
    with pytest.raises(ConfigError, match=r"from_step and anneal_steps have nothing to do: model.pretrained=.*/run is"):
        load_config(tmp_path / "tuned.yaml", ["binarize.from_step=2"])
