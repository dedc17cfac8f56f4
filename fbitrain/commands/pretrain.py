"""Pretrain a binary language model: `deepspeed launch/pretrain.py CONFIG.yaml [section.key=value ...]`."""

from __future__ import annotations

import argparse
import os
import time

from fbitrain.base.command import config_parser
from fbitrain.base.errors import UserError, tell_supervisor
from fbitrain.base.optional_writes import never_fail_to_print
from fbitrain.config import ConfigError, load_config
from fbitrain.slurm import adopt_ranks

NOT_TO_PRETRAIN = "model.pretrained is set, and pretraining starts from random weights; start it with fbitrain finetune"
NOT_TO_FINE_TUNE = (
    "model.pretrained is empty; name the model to start from, or train from scratch with fbitrain pretrain"
)


def main(arguments: argparse.Namespace) -> int:
    return start(arguments)


def start(arguments: argparse.Namespace, *, fine_tuning: bool = False) -> int:
    """Reads the configuration and trains, on this rank; ConfigError if model.pretrained is not as the command asks."""
    adopt_ranks()
    rank = int(os.environ.get("RANK", "0"))
    never_fail_to_print()
    try:
        # Before torch is imported: a mistyped key is reported in well under a second.
        config = load_config(arguments.config, arguments.overrides, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        if bool(config.model.pretrained) != fine_tuning:
            raise ConfigError(arguments.config, [NOT_TO_PRETRAIN if config.model.pretrained else NOT_TO_FINE_TUNE])
        from fbitrain.train import train

        train(config)
    except UserError as error:
        silent = rank != 0 and (error.on_all_ranks or isinstance(error, ConfigError))
        if (silent or error.said_elsewhere) and not arguments.debug:
            tell_supervisor(error)
            time.sleep(2.0)  # another rank says it; the launcher ends all ranks with the first that leaves
            return 1
        raise
    return 0


def parser(prog: str = "fbitrain pretrain", description: str | None = __doc__) -> argparse.ArgumentParser:
    commands = config_parser(prog, description)
    commands.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the DeepSpeed launcher
    return commands
