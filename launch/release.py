"""`python launch/release.py` is `fbitrain release` (fbitrain/commands/release.py)."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["release", *sys.argv[1:]])
