"""docs/add_a_method.md does what it says: its diff, applied to a copy, gives a method that trains and is released."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add_a_method.md").read_text(encoding="utf-8")
DIFF = "".join(re.findall(r"^```diff\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = [
    shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, its tests and their settings, with the page's diff applied."""
    folder = tmp_path_factory.mktemp("add_a_method")
    links = [link for link in (ROOT / "fbitrain").iterdir() if link.is_symlink()]
    for name in ("fbitrain", "tests", *(link.resolve().name for link in links)):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    apply = ["git", "apply", "--whitespace=error", "-"]
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(apply, input=DIFF, text=True, cwd=folder, env=environment, check=True)
    return folder


def run(copy: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run(
        [sys.executable, *command], cwd=copy, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_diff_touches_a_layer_a_table_and_a_test() -> None:
    assert re.findall(r"^\+\+\+ b/(.*)$", DIFF, re.MULTILINE) == [
        "model/irnet.py",
        "model/method_table.py",
        "tests/model/test_irnet.py",
    ]
    assert not re.findall(r"^-(?!-- )", DIFF, re.MULTILINE), "nothing that is there is changed"


def test_the_pages_tests_pass_in_the_copy(copy: Path) -> None:
    tests = [words[1:] for words in COMMANDS if words[0] == "pytest"]
    assert len(tests) == 2
    for arguments in tests:
        shown = run(copy, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
        assert " passed" in shown
        assert "failed" not in shown
    where = run(copy, "-P", "-c", "import fbitrain.model.irnet as irnet; print(irnet.__file__)")
    assert Path(where.strip()).resolve() == copy / "model" / "irnet.py"


def test_the_new_method_trains_and_its_packed_product_is_the_dense_one(copy: Path, launch: Any, tmp_path: Path) -> None:
    trained, released = (
        next(w for w in COMMANDS if w[:2] == ["python", f"launch/{n}.py"]) for n in ("pretrain", "release")
    )
    settings = [word for word in trained[3:] if not word.startswith("run.name=")]
    assert "binarize.method=irnet" in settings
    script = copy / "launch" / "pretrain.py"
    done = launch(
        "irnet", *settings, "train.total_steps=2", "checkpoint.every=2", script=script, env={"PYTHONPATH": str(copy)}
    )
    assert sorted(done.losses) == [1, 2]
    assert released[3] == "--out"
    run(copy, "-P", str(copy / released[1]), str(done.run_dir), "--out", str(tmp_path / "irnet"), "--dtype", "float32")
    assert "IR-Net (arXiv 1909.10788)" in (tmp_path / "irnet" / "README.md").read_text(encoding="utf-8")
    ids = torch.arange(20).view(2, 10)
    logits = []
    for name in ("dense", "packed"):
        lm = AutoModelForCausalLM.from_pretrained(tmp_path / "irnet" / name, trust_remote_code=True).eval()
        with torch.no_grad():
            logits.append(lm(input_ids=ids).logits)
    assert logits[0].std() > 0.01
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
