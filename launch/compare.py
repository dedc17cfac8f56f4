"""`python launch/compare.py` is `fbitrain compare` (fbitrain/commands/compare.py)."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
