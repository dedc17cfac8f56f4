"""Fine-tune a pretrained model with binary weights: `deepspeed launch/finetune.py CONFIG.yaml [key=value ...]`."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
