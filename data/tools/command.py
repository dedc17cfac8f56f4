"""What the data room's commands share: their arguments, their errors, tables and progress bars."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from fbitrain.data.errors import DataError

INTERRUPTED = 130  # what a shell reports for a process ended by Ctrl-C
BROKEN_PIPE = 141  # and for one ended by writing into a closed pipe


def config_parser(module: str, description: str) -> argparse.ArgumentParser:
    """A parser of `python -m fbitrain.data.MODULE config.yaml [section.key=value …]`."""
    parser = argparse.ArgumentParser(prog=f"python -m fbitrain.data.{module}", description=description)
    parser.add_argument("config", help="a training configuration, or any YAML file with a data: section")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override fields of the file")
    return parser


def run_command(
    parser: argparse.ArgumentParser,
    main: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """The exit code of `main(parsed arguments)`.

    A DataError becomes one sentence on stderr and 1, Ctrl-C 130, and an output that nobody reads to its end 141.
    """
    options = parser.parse_intermixed_args(arguments)
    try:
        code = _exit_code(parser.prog, main, options)
        sys.stdout.flush()  # what is left in the buffer must meet a closed pipe here, not at the interpreter's end
    except BrokenPipeError:
        # Nobody reads on, as with `| head`: no error. What is still buffered must go somewhere all the same.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return BROKEN_PIPE
    return code


def _exit_code(prog: str, main: Callable[[argparse.Namespace], None], options: argparse.Namespace) -> int:
    try:
        main(options)
    except DataError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


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


def n_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their names, the first to the left and numbers to the right."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        [cell.rjust(width) if i else cell.ljust(width) for cell in column]
        for i, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join("  ".join(line) for line in zip(*aligned, strict=True))


def human_bytes(n: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"
