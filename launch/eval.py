"""`python launch/eval.py` is `fbitrain eval` (fbitrain/commands/eval.py)."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["eval", *sys.argv[1:]])
