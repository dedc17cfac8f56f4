"""Pretrain a binary language model: `deepspeed launch/pretrain.py CONFIG.yaml [section.key=value ...]`."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["pretrain", *sys.argv[1:]])
