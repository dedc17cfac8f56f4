"""`python launch/release.py` is `fbitrain release` (fbitrain/commands/release.py)."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
