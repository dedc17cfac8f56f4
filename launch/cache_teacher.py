"""Write a teacher's targets once: `deepspeed launch/cache_teacher.py CONFIG.yaml --out DIR [key=value ...]`."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
