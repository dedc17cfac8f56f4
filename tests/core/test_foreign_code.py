"""A model folder's own Python code: no command runs it, even where every question is answered with yes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import dynamic_module_utils

from fbitrain import build
from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.commands import doctor, generate
from fbitrain.commands import eval as evaluate
from fbitrain.config import load_config
from fbitrain.inference.lm_eval_tasks import run_tasks
from fbitrain.loading.language_model import load_language_model
from fbitrain.loading.model_folder import load_lm

CODE = """
from pathlib import Path
Path(__file__).parent.joinpath("RAN").touch()
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast as Tokenizer
class Config(LlamaConfig):
    model_type = {model_type!r}
class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture(params=["unknown", "clip", "fbitrain_unknown"])
def folder(request: pytest.FixtureRequest, workspace: Any, tmp_path: Path) -> Path:
    """A teacher with code beside it that its config asks for: of an unknown type, and of one that is no text model."""
    path = tmp_path / "foreign"
    shutil.copytree(workspace.teacher, path)
    config = json.loads((path / "config.json").read_text())
    auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (path / "config.json").write_text(json.dumps({**config, "model_type": request.param, "auto_map": auto_map}))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (path / "own.py").write_text(CODE.format(marker=str(tmp_path / "RAN"), model_type=request.param))
    return path


@pytest.fixture(autouse=True)
def yes_to_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")


def assert_nothing_ran(folder: Path) -> None:
    assert not list(folder.parent.rglob("RAN"))


@pytest.mark.parametrize("command", ["generate", "eval", "bench"])
def test_commands_that_open_a_model(
    folder: Path, workspace: Any, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "eval":
        code = run(evaluate.main, evaluate.parser(), [str(folder), "--ppl", f"a={workspace.path}/heldout.jsonl"])
    else:
        how = ["--bench"] if command == "bench" else ["--prompt", "the"]
        code = run(generate.main, generate.parser(), [str(folder), *how])
    assert_nothing_ran(folder)
    error = capsys.readouterr().err
    assert code == 1
    assert error.count("\n") == 1
    assert str(folder) in error


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("key", ["distill.teacher", "model.pretrained"])
def test_training_and_the_doctor(folder: Path, workspace: Any, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = workspace.config.read_text()
    if key == "model.pretrained":
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("model:", "distill:")))
    path = folder.parent / "run.yaml"
    path.write_text(text)
    overrides = [f"{key}={folder}", f"run.dir={folder.parent}/runs", "distill.trust_remote_code=false"]
    run(doctor.main, doctor.parser(), ["--config", str(path), *overrides])
    assert_nothing_ran(folder)
    said = r"brings its own code|unsupported architecture|is a packed release"
    with pytest.raises(UserError, match=said) as raised:
        build.build(load_config(path, overrides), 0, 1)
    assert "\n" not in str(raised.value)
    assert_nothing_ran(folder)
    capsys.readouterr()


@pytest.mark.parametrize("folder", ["unknown"], indirect=True)
def test_the_users_own_word_runs_a_teachers_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    load_language_model(folder, torch.float32, trust_remote_code=True)
    assert (folder.parent / "RAN").exists()


@pytest.mark.parametrize("folder", ["unknown"], indirect=True)
def test_lm_evals_tokenizer(folder: Path, workspace: Any) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(UserError, match="reads by itself"):
        run_tasks(load_lm(workspace.teacher, torch.float32), folder, [])
    assert_nothing_ran(folder)
