"""`python launch/fetch_teacher.py` is `fbitrain fetch-teacher` (fbitrain/commands/fetch_teacher.py)."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["fetch-teacher", *sys.argv[1:]])
