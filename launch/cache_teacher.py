"""Write a teacher's targets once: `deepspeed launch/cache_teacher.py CONFIG.yaml --out DIR [key=value ...]`."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["cache-teacher", *sys.argv[1:]])
