"""`python launch/generate.py` is `fbitrain generate` (fbitrain/commands/generate.py)."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
