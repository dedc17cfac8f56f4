"""Pretrain a binary language model: `deepspeed launch/pretrain.py CONFIG.yaml [section.key=value ...]`."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

from fbitrain.base.errors import UserError
from fbitrain.base.optional_writes import never_fail_to_print
from fbitrain.config import Config, ConfigError, load_config
from fbitrain.slurm import adopt_ranks


def main(arguments: argparse.Namespace) -> int:
    return start(arguments, refusal)


def refusal(config: Config) -> str:
    """Why this command does not run `config`; empty if it does."""
    if config.model.pretrained:
        return "model.pretrained is set, and pretraining starts from random weights; start it with fbitrain finetune"
    return ""


def start(arguments: argparse.Namespace, refusal: Callable[[Config], str]) -> int:
    """Reads the configuration and trains, on this rank; ConfigError with what `refusal` says of it, if anything."""
    adopt_ranks()
    rank = int(os.environ.get("RANK", "0"))
    never_fail_to_print()
    try:
        # Before torch is imported: a mistyped key is reported in well under a second.
        config = load_config(arguments.config, arguments.overrides, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        if problem := refusal(config):
            raise ConfigError(arguments.config, [problem])
        from fbitrain.train import train

        train(config)
    except UserError as error:
        silent = rank != 0 and (error.on_all_ranks or isinstance(error, ConfigError))
        if (silent or error.said_elsewhere) and not arguments.debug:
            time.sleep(2.0)  # another rank says it; the launcher ends all ranks with the first that leaves
            return 1
        raise
    return 0


def parser(prog: str = "fbitrain pretrain", description: str | None = __doc__) -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog=prog, description=description)
    commands.add_argument("config", help="a YAML file, or a shipped one's name (fbitrain config list)")
    commands.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    commands.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the DeepSpeed launcher
    return commands
