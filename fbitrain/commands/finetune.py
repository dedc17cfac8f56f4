"""Fine-tune a pretrained model with binary weights: `deepspeed launch/finetune.py CONFIG.yaml [section.key=value ...]`.

Everything is as in launch/pretrain.py but the start: the model in model.pretrained, binarized by binarize.method.
"""

from __future__ import annotations

import argparse

from fbitrain.commands import pretrain
from fbitrain.config import Config


def main(arguments: argparse.Namespace) -> int:
    if arguments.no_feedback:
        arguments.overrides.append("calibration.feedback=false")
    return pretrain.start(arguments, refusal)


def refusal(config: Config) -> str:
    """Why this command does not run `config`; empty if it does."""
    if not config.model.pretrained:
        return "model.pretrained is empty; name the model to start from, or train from scratch with fbitrain pretrain"
    return ""


def parser() -> argparse.ArgumentParser:
    commands = pretrain.parser("fbitrain finetune", __doc__)
    commands.add_argument(
        "--no-feedback", action="store_true", help="GPTQ-PB without error feedback: calibration.feedback=false"
    )
    return commands
