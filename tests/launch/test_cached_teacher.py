"""`fbitrain cache-teacher` on ranks that are killed, and training on what it wrote: real launches."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from fbitrain.data.commands.pretokenize import main as pretokenize
from fbitrain.data.commands.pretokenize import parser
from fbitrain.teacher_int8 import why_no_int8
from tests.conftest import ROOT

pytestmark = pytest.mark.launch
CACHE_TEACHER = ROOT / "launch" / "cache_teacher.py"


@pytest.fixture(scope="module")
def tokens(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    pretokenize(parser().parse_args([str(workspace.config), "--out", str(folder), "--workers", "1"]))
    return folder


@pytest.fixture(scope="module")
def cache(launch: Any, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    written = launch("write", *writing(tokens, folder), script=CACHE_TEACHER)
    assert "24" in written.output
    assert f"finished; train on it with distill.cache={folder}" in written.output
    return folder


def writing(tokens: Path, out: Path, *more: str) -> tuple[str, ...]:
    return (f"data.pretokenized={tokens}", "--out", str(out), *more)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_killed_and_continued_on_fewer_ranks_it_is_the_same(
    launch: Any, tokens: Path, cache: Path, tmp_path: Path
) -> None:
    killed = launch.start("killed", *writing(tokens, tmp_path / "cache"), script=CACHE_TEACHER)
    killed.wait_for(lambda: any((tmp_path / "cache").rglob("*.frames")))
    killed.signal(signal.SIGKILL)
    killed.wait_for_all()
    launch("continued", *writing(tokens, tmp_path / "cache"), script=CACHE_TEACHER, ranks=1)
    assert files(tmp_path / "cache") == files(cache)


def test_it_says_what_it_would_take_and_writes_nothing(launch: Any, tokens: Path, tmp_path: Path) -> None:
    said = launch("estimate", *writing(tokens, tmp_path / "cache", "--estimate"), script=CACHE_TEACHER, ranks=1).output
    assert "tokens are left: about" in said
    assert "bytes per token" in said
    assert "hours" in said
    assert not list((tmp_path / "cache").rglob("*.frames"))


def test_training_on_it_needs_no_teacher_and_resumes_exactly(
    launch: Any, workspace: Any, tokens: Path, cache: Path, tmp_path: Path
) -> None:
    """3 + 3 steps with a kill are 6 steps; the teacher's weights are not there at all."""
    shutil.copytree(workspace.teacher, tmp_path / "teacher", ignore=shutil.ignore_patterns("*.safetensors"))
    settings = (f"distill.cache={cache}", f"data.pretokenized={tokens}", f"data.tokenizer={tmp_path}/teacher")
    whole = launch("cached-6", *settings, "distill.teacher=")
    kd = [line["train/kd"] for line in whole.metrics if "train/kd" in line]
    assert len(kd) == 6
    assert kd[-1] < kd[0]
    assert not any("teacher/entropy" in line or "train/top1_agreement" in line for line in whole.metrics)
    stopped = launch.start("cached-3", *settings, "distill.teacher=")
    stopped.wait_for(lambda: (stopped.run_dir / "checkpoints" / "step_00000003").exists())
    stopped.signal(signal.SIGKILL)
    stopped.wait_for_all()
    resumed = launch("cached-3", *settings, "distill.teacher=")
    assert resumed.losses == whole.losses
    fewer = launch("cached-3", *settings, "distill.teacher=", "train.total_steps=8", ranks=1)
    assert fewer.losses[8] == pytest.approx(fewer.losses[6], rel=0.1)
    assert "resumed from" in fewer.output


@pytest.mark.slow
def test_shards_without_targets_are_refused_or_asked_of_the_teacher(
    launch: Any, workspace: Any, tokens: Path, cache: Path, tmp_path: Path
) -> None:
    part = tmp_path / "part"
    shutil.copytree(cache, part)
    for path in part.rglob("beta/*.json"):
        path.unlink()
    settings = (f"distill.cache={part}", f"data.pretokenized={tokens}")
    refused = launch("refused", *settings, expect=None, ranks=1)
    assert "has no targets for 3 shards, beta/0.jsonl among them; write them with" in refused.output
    both = launch("both", *settings, "distill.cache_gaps=teacher", "engine.zero_stage=3")
    live = launch("live", f"data.pretokenized={tokens}")
    for step, loss in both.losses.items():
        assert loss == pytest.approx(live.losses[step], rel=0.05)
        assert loss != live.losses[step]


def test_a_cache_of_something_else_is_refused_before_training(
    launch: Any, workspace: Any, tokens: Path, cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(workspace.teacher, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    settings = (f"distill.cache={cache}", f"data.pretokenized={tokens}")
    said = launch("other", *settings, f"distill.teacher={other}", expect=None, ranks=1).output
    assert f"holds the targets of {workspace.teacher}, which is another model than distill.teacher={other}" in said
    said = launch("no-bos", *settings, "data.add_bos=false", expect=None, ranks=1).output
    assert "was written with data.add_bos=True, and this run has False" in said
    said = launch("hot", *settings, "distill.temperature=2", expect=None, ranks=1).output
    assert "distill.cache holds targets at temperature 1" in said


def test_damage_ends_the_run_in_a_sentence_with_a_checkpoint(
    launch: Any, tokens: Path, cache: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(cache, damaged)
    for path in damaged.rglob("*.frames"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    settings = (f"distill.cache={damaged}", f"data.pretokenized={tokens}", "train.total_steps=200", "eval.every=0")
    ended = launch("damaged", *settings, expect=None)
    assert ended.process.returncode != 0
    assert ".frames is damaged at the document of line" in ended.output
    assert "Traceback" not in ended.output
    assert list((ended.run_dir / "checkpoints").glob("step_*"))


@pytest.mark.slow
@pytest.mark.skipif(bool(why_no_int8(torch.device("cpu"))), reason="this CPU multiplies no int8")
def test_a_live_teacher_may_be_compiled_and_in_int8(launch: Any) -> None:
    live = launch("exact", ranks=1, expect=0)
    cheaper = launch("int8", "distill.int8=true", "distill.compile=true", ranks=1)
    assert "the teacher in int8: KL 0.0" in cheaper.output
    for step, loss in cheaper.losses.items():
        assert loss == pytest.approx(live.losses[step], rel=0.01)
        assert loss != live.losses[step]
