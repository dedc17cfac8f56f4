"""The error that is meant for the user: one sentence, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. Its message says what is wrong, where, and what to do."""

    on_all_ranks = False  # set where every rank raises the same error, so that only rank 0 prints it
    said_elsewhere = False  # set where another rank says it, so that this one does not
