"""What every command does with errors and arguments, the verbs, and numbers a person can read."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fbitrain.base.command import BROKEN_PIPE, INTERRUPTED, config_parser, natural, positive, run
from fbitrain.base.errors import UserError
from fbitrain.base.files import require_writable
from fbitrain.commands import verbs
from fbitrain.commands.eval import named_files
from fbitrain.data.tools.tables import human_bytes, table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("it is broken; mend it"), 1, "it is broken; mend it"),
        (KeyboardInterrupt(), INTERRUPTED, "interrupted"),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, message: str
) -> None:
    def main(options: argparse.Namespace) -> None:
        raise error

    assert run(main, config_parser("fbitrain data inspect", ""), ["config.yaml"]) == code
    assert capsys.readouterr().err == f"fbitrain data inspect: {message}\n"


TALK = """
import sys
from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.base.command import config_parser
def main(options):
    print("\\u6f22 \\udcff")
    print("said", file=sys.stderr)
    if "fail" in sys.argv:
        raise UserError("kaputt: \\xfc")
sys.exit(run(main, config_parser("fbitrain data inspect", ""), ["config.yaml"]))
"""


def test_letters_that_the_terminal_has_not_are_written_out() -> None:
    for encoding, shown in (("ascii", "\\u6f22 \\udcff"), ("utf-8", "漢 \\udcff")):
        env = {**os.environ, "PYTHONIOENCODING": encoding}
        ended = subprocess.run([sys.executable, "-c", TALK, "fail"], capture_output=True, env=env, timeout=60)
        assert ended.returncode == 1
        assert ended.stdout.decode(encoding) == f"{shown}\n"
        assert "kaputt" in ended.stderr.decode(encoding)
        assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "2>&1 | true"])
@pytest.mark.parametrize("how", ["fail", ""])
def test_a_closed_stdout_or_stderr_is_no_fault(closed: str, how: str) -> None:
    script = f'exec "$0" -c "$1" {how} {closed}'
    ended = subprocess.run(["bash", "-c", script, sys.executable, TALK], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in ended.stdout + ended.stderr
    assert "Exception ignored" not in ended.stdout + ended.stderr
    if "|" not in closed:
        assert ended.returncode == (1 if how else 0)


PRINT = """
import sys
from fbitrain.base.command import run
from fbitrain.base.command import config_parser
def main(options):
    print("\\n".join(["line"] * int(sys.argv[1])))
sys.exit(run(main, config_parser("fbitrain data inspect", ""), ["config.yaml"]))
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


BREAK = """
import os, sys
from fbitrain.base.command import run
from fbitrain.base.command import config_parser
def main(options):
    print("begun", flush=True)
    end, start = os.pipe()
    os.close(end)
    os.write(start, b"to a worker that has died")
sys.exit(run(main, config_parser("fbitrain data inspect", ""), ["config.yaml"]))
"""


def test_another_pipe_that_breaks_is_not_passed_over() -> None:
    ended = subprocess.run([sys.executable, "-c", BREAK], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "begun\n")
    assert "BrokenPipeError" in ended.stderr


def path_options() -> Iterator[tuple[str, str]]:
    """Each verb and each of its options that names a file or a folder, as their help says it."""
    for verb, (module, _) in verbs.VERBS.items():
        for action in importlib.import_module(f"fbitrain.{module}").parser()._actions:
            about = f"{action.metavar} {action.help}"
            if action.option_strings and action.nargs != 0 and re.search(r"\b(file|folder|YAML|JSON|FILE)\b", about):
                yield verb, action.option_strings[0]


@pytest.mark.parametrize(("verb", "option"), path_options())
def test_every_path_may_begin_at_home(verb: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of mine")
    parser = importlib.import_module(f"fbitrain.{verbs.VERBS[verb][0]}").parser()
    seen: list[argparse.Namespace] = []
    for action in parser._actions:
        action.required = False
        action.nargs = "*" if not action.option_strings else action.nargs
    if option == "--ppl":
        assert run(seen.append, parser, ["--ppl", "a=~/x", "b=y"]) == 0
        assert named_files(seen[0].ppl) == {"a": Path("/home/of mine/x"), "b": Path("y")}
    else:
        assert run(seen.append, parser, [f"{option}=~/x"]) == 0
        values = [item for value in vars(seen[0]).values() for item in (value if isinstance(value, list) else [value])]
        assert Path("/home/of mine/x") in values


def test_what_a_wheel_has_not_is_not_advised() -> None:
    """Commands are called as verbs, and configurations by their names: a wheel has no scripts to start."""
    for verb in verbs.TRAINING:
        shown = importlib.import_module(f"fbitrain.{verbs.VERBS[verb][0]}").parser().format_help()
        assert "launch/configs" not in shown
        assert "fbitrain config list" in " ".join(shown.split())
    script = re.compile(r"launch/\w+\.py")
    for path in sorted((ROOT / "fbitrain").rglob("*.py")):
        said = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise | ast.Yield)]
        texts = [str(text.value) for node in said for text in ast.walk(node) if isinstance(text, ast.Constant)]
        assert not any(map(script.search, texts)) or path.name == "summarize.py", path  # which is for the quickstart


def test_options_and_overrides_may_be_mixed() -> None:
    parser = config_parser("fbitrain data inspect", "")
    parser.add_argument("--n", type=positive)
    seen: list[argparse.Namespace] = []
    assert run(seen.append, parser, ["c.yaml", "data.seed=1", "--n", "3", "data.n_lanes=2"]) == 0
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


def test_a_verb_is_its_module_and_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in verbs.VERBS:
        with pytest.raises(SystemExit) as ended:
            verbs.call([*verb.split(), "--help"])
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: fbitrain {verb} ")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["data"], ["data", "-h"]])
def test_without_a_verb_all_are_listed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.call(arguments) == 0
    listed = capsys.readouterr().out
    assert all(f"  {verb} " in listed for verb in verbs.VERBS)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pretrian", "x.yaml"], "fbitrain: 'pretrian' is no verb; did you mean pretrain?"),
        (["data", "inspekt"], "fbitrain: 'data inspekt' is no verb; did you mean data inspect?"),
        (["x.yaml"], "fbitrain: 'x.yaml' is no verb; `fbitrain` alone lists them"),
    ],
)
def test_an_unknown_verb_is_refused(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verbs.call(arguments) == 2
    assert capsys.readouterr() == ("", f"{sentence}\n")


def test_every_script_of_launch_is_a_verb() -> None:
    for script in sorted((ROOT / "launch").glob("*.py")):
        assert script.read_text().endswith("\n\nleave_script(__name__, __file__)\n")
        assert script.stem.replace("_", "-") in verbs.VERBS


def test_a_shipped_configuration_is_shown_by_its_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verbs.call(["config", "show", "quickstart", "train.total_steps=70"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["train"]["total_steps"], shown["optim"]["optimizer"]) == (70, "muon")
    assert verbs.call(["config", "list"]) == 0
    assert "quickstart " in capsys.readouterr().out
    assert verbs.call(["config", "show", "quikstart"]) == 1
    assert "`fbitrain config list` names the shipped ones" in capsys.readouterr().err


def test_whether_a_file_can_be_written_is_asked_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_writable(tmp_path / "file", "--out")
    require_writable(tmp_path / "new", "--out")
    require_writable(tmp_path / "a" / "b" / "new", "--out", makes_folders=True)
    for path, makes, why in (
        (tmp_path, False, "it is a folder"),
        (tmp_path / "a" / "new", False, "there is no folder"),
        (tmp_path / "file" / "new", False, "is no folder"),
        (tmp_path / "file" / "a" / "new", True, "is no folder"),
        (Path("/proc/self/new"), False, "is not yours to write to"),
    ):
        if why.startswith("is not yours") and os.access("/proc/self", os.W_OK):
            continue
        with pytest.raises(UserError, match=f"--out {path} cannot be written: .*{why}"):
            require_writable(path, "--out", makes_folders=makes)


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "MODEL", "--ppl", "a=TEXT", "--out", "nowhere/figures.json"],
        ["compare", str(ROOT / "launch" / "studies" / "recipes.yaml"), "--results", "nowhere/results.json"],
        ["data", "duplicates", "CONFIG", "--out", "nowhere/copies.npz"],
        ["data", "holdout", "CONFIG", "--out", "file/heldout.jsonl.zst"],
        ["data", "train-tokenizer", "TEXT", "--out", "file/tokenizer.model"],
        ["release", "RUN", "--out", "file/release"],
        ["release", "RUN", "--out", "file"],
        ["fetch-teacher", "--out", "file"],
    ],
    ids=lambda command: "-".join(command[:2]),
)
def test_every_out_is_looked_at_before_the_inputs_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """None of the inputs exists: what is said is about the output all the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert verbs.call(command) == 1
    assert re.search(r"cannot be written|exists and (is|was) not", capsys.readouterr().err)
