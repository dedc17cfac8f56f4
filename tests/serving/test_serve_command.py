"""Commands where nothing but inference is installed: some run, and the others say which extra they need."""

from __future__ import annotations

import configparser
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import pytest

from fbitrain.base.extras import EXTRAS
from fbitrain.kernels import cpu

needs_kernels = pytest.mark.skipif(bool(cpu.levels()["portable"]), reason="the compiled kernels do not run here")
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
HIDDEN = ("deepspeed", "tensorboard", "matplotlib", "lm_eval")
COMMANDS = """
import sys
class Hiding:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, *where):
        return None if name.split(".")[0] in {hidden!r} else self.finder.find_spec(name, *where)
sys.meta_path[:] = map(Hiding, sys.meta_path)
from fbitrain.commands.verbs import call
codes = [call(command) for command in {commands!r}]
sys.exit(codes[0] if len(codes) == 1 else str(codes))
"""


def python(*commands: list[str], hidden: tuple[str, ...] = HIDDEN) -> list[str]:
    """A process that calls the verbs one after the other, and exits with the code of one or prints those of several."""
    return [sys.executable, "-c", COMMANDS.format(hidden=hidden, commands=commands)]


@needs_kernels
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_the_command_serves_without_what_training_needs(packed: Path, number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        python(["serve", str(packed), "--port", "0", "--name", "tiny"]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving tiny at http://127.0.0.1:"), line
            client = openai.OpenAI(base_url=line.split()[3], api_key="none", timeout=60)
            stream = client.completions.create(prompt="x", max_tokens=500, stream=True, **GREEDY)
            next(iter(stream))
            process.send_signal(number)
            rest = list(stream)  # in flight, it is answered to its end
            assert rest[-1].choices[0].finish_reason == "length"
            assert process.wait(60) == 0
            assert process.stderr is not None
            assert process.stderr.read() == ""
        finally:
            process.kill()


def ended(*commands: list[str], hidden: tuple[str, ...] = HIDDEN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(python(*commands, hidden=hidden), capture_output=True, text=True, timeout=240)


@needs_kernels
def test_inference_needs_no_extra(packed: Path, workspace: Any) -> None:
    text = f"held={workspace.path}/heldout.jsonl"
    done = ended(
        ["generate", str(packed), "--prompt", "the", "--max-new-tokens", "3"],
        ["eval", str(packed), "--ppl", text, "--seq-len", "24", "--max-tokens", "48"],
        ["doctor"],
    )
    assert done.stderr.endswith("[0, 0, 0]\n"), done.stderr
    assert done.stdout.startswith("the")
    assert (
        "training   no (deepspeed, tensorboard, matplotlib not installed; pip install 'fbitrain[train]')" in done.stdout
    )


def test_a_verb_says_which_extra_it_needs(workspace: Any) -> None:
    verbs = ("pretrain", "finetune", "summarize")
    done = ended(*([verb, str(workspace.config), *["x"] * (verb == "summarize")] for verb in verbs))
    absent = "deepspeed, tensorboard and matplotlib are not installed"
    expected = [f"fbitrain {v}: {absent}, and fbitrain {v} needs them; pip install 'fbitrain[train]'" for v in verbs]
    assert done.stderr.splitlines() == [*expected, "[1, 1, 1]"]
    done = ended(["serve", "x"], hidden=("uvicorn",))
    sentence = "uvicorn is not installed, and fbitrain serve needs it; pip install 'fbitrain[serve]'"
    assert (done.stderr, done.returncode) == (f"fbitrain serve: {sentence}\n", 1)


def test_the_extras_hold_what_the_verbs_ask_for() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    for extra, modules in EXTRAS.items():
        packages = setup["options.extras_require"][extra].split("\n")
        assert tuple(re.split(r"[<>=]", line)[0] for line in packages if line) == modules
        assert not set(modules) & {re.split(r"[<>=]", line)[0] for line in setup["options"]["install_requires"].split()}
