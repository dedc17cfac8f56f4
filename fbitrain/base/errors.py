"""The error that is meant for the user: one sentence, no traceback. And what a supervisor is told of it."""

from __future__ import annotations

import json
import os
from contextlib import suppress

ERROR_FILE = "FBITRAIN_ERROR_FILE"  # a supervisor names a file here, into which a process writes the error that ends it
_OF_A_MISTAKE = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class UserError(Exception):
    """Something the user can mend. Its message says what is wrong, where, and what to do."""

    on_all_ranks = False  # set where every rank raises the same error, so that only rank 0 prints it
    said_elsewhere = False  # set where another rank says it, so that this one does not
    restart_mends: bool | None = None  # whether the same command may succeed if it is started again; None: not known


def passing(text: str) -> UserError:
    """An error that may be gone when the same command is started again."""
    error = UserError(text)
    error.restart_mends = True
    return error


def may_pass(error: BaseException | None) -> bool | None:
    """Whether a restart may mend `error`: what it says itself, else yes where a disk or network failed, else None."""
    while error is not None:
        if isinstance(error, UserError) and error.restart_mends is not None:
            return error.restart_mends
        if isinstance(error, OSError):
            return None if isinstance(error, _OF_A_MISTAKE) else True
        error = error.__cause__ or error.__context__
    return None


def tell_supervisor(error: UserError) -> None:
    """Leaves `error` where a supervisor of this process looks, if there is one."""
    if path := os.environ.get(ERROR_FILE):
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"error": str(error), "restart_mends": may_pass(error), "echo": error.said_elsewhere}, file)
