"""`python launch/summarize.py` is `fbitrain summarize` (fbitrain/commands/summarize.py)."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
