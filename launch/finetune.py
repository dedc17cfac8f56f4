"""Fine-tune a pretrained model with binary weights: `deepspeed launch/finetune.py CONFIG.yaml [key=value ...]`."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["finetune", *sys.argv[1:]])
