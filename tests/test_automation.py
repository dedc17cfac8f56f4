"""The configurations of pre-commit and of continuous integration: they parse, and what they call is there."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / ".pre-commit-config.yaml"
WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_every_hook_calls_a_tool_of_the_dev_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    dev = setup["options.extras_require"]["dev"]
    checks = (ROOT / "test.sh").read_text(encoding="utf-8").splitlines()
    (repo,) = read(HOOKS)["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        words = shlex.split(hook["entry"])
        assert re.search(rf"^{words[0]}\b", dev, re.MULTILINE), hook
        assert (Path(sys.executable).parent / words[0]).is_file(), hook
        assert hook["language"] == "system"
        options = [word for word in words if word != "--force-exclude"]
        assert any(line.split()[: len(options)] == options for line in checks), hook


def test_the_workflow_runs_test_sh_on_the_oldest_python_and_a_newer_one() -> None:
    job = read(WORKFLOW)["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == ["./test.sh"]
    assert os.access(ROOT / "test.sh", os.X_OK)
    pythons = job["strategy"]["matrix"]["python"]
    assert pythons == ["3.10", "3.12"], "as strings: 3.10 as a number is 3.1"
    assert f">={pythons[0]}" in (ROOT / "setup.cfg").read_text(encoding="utf-8").replace(" ", "")
