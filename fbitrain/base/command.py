"""What every command does with its arguments and errors: one sentence for the user, a traceback only with --debug."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from fbitrain.base.errors import UserError, tell_supervisor

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C
BROKEN_PIPE = 141  # and for one ended by writing into a closed pipe


def run(
    main: Callable[[argparse.Namespace], int | None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parses `argv` (default: the command line) and returns the exit code of `main(arguments)`; None counts as 0.

    In arguments of the type Path `~` is expanded: shells leave it in --out=~/x as it is.

    A UserError becomes one sentence on stderr and exit code 1, Ctrl-C becomes 130, and an output that nobody reads to
    its end 141. With --debug, which is added to `parser`, they are raised as they are. Any other exception is a fault
    of ours and keeps its traceback.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal's encoding has no letter for is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    arguments = parser.parse_intermixed_args(argv)
    vars(arguments).update({name: at_home(value) for name, value in vars(arguments).items()})
    try:
        return until_nobody_reads(lambda: main(arguments) or 0)
    except (KeyboardInterrupt, UserError) as error:
        if isinstance(error, UserError):
            tell_supervisor(error)
        if arguments.debug:
            raise
        interrupted = isinstance(error, KeyboardInterrupt)
        with suppress(BrokenPipeError):
            print(f"{parser.prog}: {'interrupted' if interrupted else error}", file=sys.stderr, flush=True)
        return INTERRUPTED if interrupted else 1


def until_nobody_reads(work: Callable[[], int]) -> int:
    """The exit code of `work()`, or 141 if its stdout goes to a closed pipe, as with `| head`.

    A BrokenPipeError of another pipe, such as one to a process that has died, is raised as it is.
    """
    try:
        code = work()
        if sys.stdout is not None:  # as it is where the shell closed it
            sys.stdout.flush()  # what is left in the buffer must meet a closed pipe here, not at the interpreter's end
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)  # what is still buffered must go somewhere all the same
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return BROKEN_PIPE
    return code


def _stdout_is_broken() -> bool:
    try:
        file = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # closed by the shell, or replaced by what is no file
        return False
    poll = select.poll()
    poll.register(file, 0)  # an error is reported unasked
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def at_home(value: Any) -> Any:
    """A Path, or a list of some, with `~` and `~user` expanded; any other value as it is."""
    if isinstance(value, list):
        return [at_home(item) for item in value]
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def config_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """A parser of `PROG CONFIG.yaml [section.key=value …]`."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("config", help="a YAML file, or a shipped one's name (fbitrain config list)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    return parser


def positive(text: str) -> int:
    """argparse type of a whole number that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def natural(text: str) -> int:
    """argparse type of a whole number that is not negative."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value
