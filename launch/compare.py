"""`python launch/compare.py` is `fbitrain compare` (fbitrain/commands/compare.py)."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["compare", *sys.argv[1:]])
