"""`python launch/generate.py` is `fbitrain generate` (fbitrain/commands/generate.py)."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["generate", *sys.argv[1:]])
