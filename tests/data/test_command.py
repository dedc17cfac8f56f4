"""What the data room's commands share: exit codes, and numbers a person can read."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import pytest

from fbitrain.data.errors import DataError
from fbitrain.data.tools.command import (
    BROKEN_PIPE,
    INTERRUPTED,
    config_parser,
    human_bytes,
    natural,
    positive,
    run_command,
    table,
)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DataError("it is broken; mend it"), 1, "it is broken; mend it"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def main(options: argparse.Namespace) -> None:
        raise error

    assert run_command(config_parser("inspect", ""), main, ["config.yaml"]) == code
    assert capsys.readouterr().err == f"python -m fbitrain.data.inspect: {message}\n"


PRINT = """
import sys
from fbitrain.data.tools.command import config_parser, run_command
def main(options):
    print("\\n".join(["line"] * int(sys.argv[1])))
sys.exit(run_command(config_parser("inspect", ""), main, ["config.yaml"]))
"""


@pytest.mark.parametrize("n_lines", [1, 200_000], ids=["left in the buffer", "more than a pipe holds"])
def test_an_output_that_nobody_reads_is_no_traceback(n_lines: int) -> None:
    command = [sys.executable, "-c", PRINT, str(n_lines)]
    end, closed = os.pipe()
    os.close(end)
    try:
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(closed)
    assert (ended.returncode, ended.stderr) == (BROKEN_PIPE, "")


def test_options_and_overrides_may_be_mixed() -> None:
    parser = config_parser("inspect", "")
    parser.add_argument("--n", type=positive)
    seen: list[argparse.Namespace] = []
    assert run_command(parser, seen.append, ["c.yaml", "data.seed=1", "--n", "3", "data.n_lanes=2"]) == 0
    assert (seen[0].config, seen[0].overrides, seen[0].n) == ("c.yaml", ["data.seed=1", "data.n_lanes=2"], 3)


@pytest.mark.parametrize(("kind", "text"), [(positive, "0"), (natural, "-1")])
def test_numbers_out_of_range_are_refused(kind: type[int], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        kind(text)


@pytest.mark.parametrize(
    ("n", "expected"), [(0, "0 B"), (999, "999 B"), (1234567, "1.2 MB"), (5e12, "5.0 TB"), (2e16, "20000.0 TB")]
)
def test_bytes_for_people(n: float, expected: str) -> None:
    assert human_bytes(n) == expected


def test_a_table_is_aligned() -> None:
    assert table(["source", "n"], [["c4", "10"], ["wikipedia", "7"]]) == "source      n\nc4         10\nwikipedia   7"
