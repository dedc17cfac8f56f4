"""`python launch/summarize.py` is `fbitrain summarize` (fbitrain/commands/summarize.py)."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["summarize", *sys.argv[1:]])
