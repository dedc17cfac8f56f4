"""`python launch/fetch_teacher.py` is `fbitrain fetch-teacher` (fbitrain/commands/fetch_teacher.py)."""

from fbitrain.commands.verbs import leave_script

leave_script(__name__, __file__)
