"""What every command does with its arguments and errors: one sentence for the user, a traceback only with --debug."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fbitrain.errors import UserError

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `argv` (default: the command line) and returns the exit code of `main(arguments)`; None counts as 0.

    UserError and DataError become one sentence on stderr and exit code 1, Ctrl-C becomes 130; with --debug, which is
    added to `parser`, they are raised as they are. Any other exception is a fault of ours and keeps its traceback.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    try:
        return main(arguments) or 0
    except KeyboardInterrupt:
        if arguments.debug:
            raise
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except _errors_for_the_user() as error:  # evaluated only once something was raised
        if arguments.debug:
            raise
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def add_activations(parser: argparse.ArgumentParser) -> None:
    """Adds --activations, which commands that run a packed model share."""
    parser.add_argument(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help="of a packed model on the CPU: float (default), as in training, or int8 per token, faster and less exact",
    )


def positive(text: str) -> int:
    """argparse type of a whole number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _errors_for_the_user() -> tuple[type[Exception], ...]:
    # Imported this late because a command that has nothing to report need not load the data room.
    from fbitrain.data.errors import DataError

    return UserError, DataError
