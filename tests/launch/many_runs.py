"""Trains many configurations one after another in one process of one rank, which imports torch only once.

`many_runs.py CONFIG`, with a JSON list of lists of overrides on standard input.
"""

from __future__ import annotations

import json
import sys

import torch.distributed as dist

from fbitrain.config import load_config
from fbitrain.train import train


def keep_process_group(*_: object) -> None:
    """DeepSpeed remembers the group it made first; training ends by destroying it."""


if __name__ == "__main__":
    dist.destroy_process_group = keep_process_group
    for overrides in json.load(sys.stdin):
        train(load_config(sys.argv[1], overrides))
