"""`python launch/doctor.py` is `fbitrain doctor` (fbitrain/commands/doctor.py)."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
