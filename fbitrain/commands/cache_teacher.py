"""Write a teacher's targets once: `deepspeed launch/cache_teacher.py CONFIG.yaml --out DIR [section.key=value ...]`.

The configuration names the teacher and the pretokenized shards, as for training. Killed at any moment, it goes on with
what is not finished when it is run again, on any number of ranks. docs/distillation.md says how to train on it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fbitrain.base.command import config_parser, positive
from fbitrain.config import ConfigError, load_config


def main(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    problems = []
    if not config.distill.teacher:
        problems.append("distill.teacher is empty; name the teacher whose targets are wanted")
    if not config.data.pretokenized:
        problems.append(
            "data.pretokenized is empty; a cache belongs to such shards, so run `fbitrain data pretokenize`"
        )
    if config.distill.host != "replicated":
        problems.append("distill.host=zero3 shards the teacher, which is held whole here; set distill.host=replicated")
    if not arguments.proposal_temperature > 0:
        problems.append(f"--proposal-temperature {arguments.proposal_temperature} must be positive")
    if problems:
        raise ConfigError(arguments.config, problems)
    from fbitrain.cache_teacher import CacheOptions, cache_teacher

    options = CacheOptions(
        out=arguments.out,
        draws=arguments.draws,
        top=arguments.top,
        systematic=arguments.systematic,
        temperature=arguments.proposal_temperature,
        seed=arguments.seed,
        context=arguments.context,
        overlap=arguments.overlap,
        batch_tokens=arguments.batch_tokens,
        estimate_only=arguments.estimate,
    )
    cache_teacher(replace(config, distill=replace(config.distill, cache="")), options)
    return 0


def parser() -> argparse.ArgumentParser:
    commands = config_parser("fbitrain cache-teacher", __doc__)
    commands.add_argument("--out", type=Path, required=True, help="folder for the targets; run again, it is completed")
    targets = commands.add_mutually_exclusive_group()
    targets.add_argument("--draws", type=positive, default=50, help="of the teacher's softmax per token (default 50)")
    targets.add_argument("--top", type=positive, default=0, help="likeliest words instead of draws, a biased target")
    commands.add_argument("--systematic", action="store_true", help="draws at even distances: less noise, unbiased too")
    temperature = commands.add_argument("--proposal-temperature", type=float, default=1.0, metavar="T")
    temperature.help = "draw from softmax(logits / T), with importance weights (default 1)"
    commands.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")
    commands.add_argument("--context", type=positive, default=0, help="tokens that the teacher sees (usually 2048)")
    commands.add_argument("--overlap", type=positive, default=0, help="of them seen before, in long documents (half)")
    commands.add_argument("--batch-tokens", type=positive, default=4096, help="of a forward (default 4096)")
    commands.add_argument("--estimate", action="store_true", help="say what it would take, and write nothing")
    commands.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the DeepSpeed launcher
    return commands
