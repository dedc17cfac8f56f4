"""Real launches of fine-tuning: what pretraining promises of runs, kept for models that were loaded and binarized.

A run that was killed and resumed, also on another ZeRO stage, is the run that was not; a mode that cannot be is one
sentence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch
ROOT = Path(__file__).parents[2]
FINETUNE = ROOT / "launch" / "finetune.py"
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
PARTIAL = (
    *("binarize.method=partial", "binarize.scale=row", "binarize.beta=false", "binarize.salient.criterion=hessian"),
    *("calibration.n_sequences=4", "calibration.seq_len=16"),
)
MOS = ("binarize.method=mixture_of_scales", "binarize.n_experts=3", "distill.hidden_weight=10")


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


def test_a_pretrained_model_learns_to_be_binary(finetune: Any) -> None:
    run = finetune("binary", "train.total_steps=12", "optim.lr=2e-3", deepspeed=True)
    assert run.losses[12] < run.losses[1]
    last = [line for line in run.metrics if "train/loss" in line][-1]
    assert {"train/kd", "signs/flipped", "teacher/entropy"} <= last.keys()
    again = finetune("binary", "train.total_steps=12", "optim.lr=2e-3")
    assert "nothing to do" in again.output
