"""Pretrain a binary language model: `deepspeed launch/pretrain.py CONFIG.yaml [section.key=value ...]`."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
