"""`python launch/eval.py` is `fbitrain eval` (fbitrain/commands/eval.py)."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
