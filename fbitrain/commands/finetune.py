"""Fine-tune a pretrained model with binary weights: `deepspeed launch/finetune.py CONFIG.yaml [section.key=value ...]`.

Everything is as in launch/pretrain.py but the start: the model in model.pretrained, binarized by binarize.method.
"""

from __future__ import annotations

import argparse

from fbitrain.commands import pretrain


def main(arguments: argparse.Namespace) -> int:
    if arguments.no_feedback:
        arguments.overrides.append("calibration.feedback=false")
    return pretrain.start(arguments, fine_tuning=True)


def parser() -> argparse.ArgumentParser:
    commands = pretrain.parser("fbitrain finetune", __doc__)
    commands.add_argument(
        "--no-feedback", action="store_true", help="GPTQ-PB without error feedback: calibration.feedback=false"
    )
    return commands
