"""`python launch/doctor.py` is `fbitrain doctor` (fbitrain/commands/doctor.py)."""

import sys

from fbitrain.commands.verbs import leave

if __name__ == "__main__":
    leave(["doctor", *sys.argv[1:]])
