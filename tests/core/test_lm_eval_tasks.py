"""lm-eval on local files: what is picked out of its figures, and what guessing would give."""

from __future__ import annotations

import builtins
import importlib.util
import json
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.commands import eval as command
from fbitrain.inference.lm_eval_tasks import run_tasks
from fbitrain.loading.model_folder import load_lm

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
N = 6
ACC = "[{metric: acc}, {metric: acc_norm}]"
CHOICE = {"output_type": "multiple_choice", "doc_to_text": "goal", "doc_to_choice": '"{{[sol1, sol2]}}"'}
TASKS = {
    "local_choice": {**CHOICE, "doc_to_target": "label", "num_fewshot": "1"},
    # As WinoGrande: the choices are contexts, the text is the number of the right one, the target its continuation.
    "local_contexts": {**CHOICE, "doc_to_text": "label", "doc_to_target": "goal"},
    "local_words": {**CHOICE, "doc_to_choice": "[learns, one bit]", "doc_to_target": "answer"},
    # As SciQ: the right answer always stands last.
    "local_last": {**CHOICE, "doc_to_target": '"{{1}}"'},
    # As LAMBADA: the last word, all of them different.
    "local_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "goal",
        "doc_to_target": "word",
        "metric_list": "[{metric: perplexity}, {metric: acc}]",
    },
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": '""',
        "doc_to_target": "goal",
        "metric_list": "[{metric: word_perplexity}, {metric: bits_per_byte}]",
    },
}


def write_tasks(folder: Path, data: Path) -> None:
    folder.mkdir()
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    source += "fewshot_split: test\nmetadata: {version: 2.5}\n"
    for name, fields in TASKS.items():
        lines = {"metric_list": ACC, **fields}
        text = "".join(f"{key}: {value}\n" for key, value in lines.items())
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{source}{text}")
    (folder / "group.yaml").write_text("group: local_group\ntask: [local_choice, local_contexts]\n")


def only_own_tasks(manager: Any, include_path: str | None, include_defaults: bool = True) -> Any:
    return manager(include_path=include_path, include_defaults=False)


@pytest.fixture
def local(tmp_path: Path, workspace: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of an evaluation on local tasks."""
    from lm_eval import tasks

    # Indexing lm-eval's own tasks takes most of a minute, and none of them is wanted here.
    monkeypatch.setattr(tasks, "TaskManager", partial(only_own_tasks, tasks.TaskManager))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answers = ["learns", "one bit"]
    rows = [
        {"goal": f"the model {i}", "sol1": answers[0], "sol2": answers[1], "label": int(i < 4), "word": f"w{i}"}
        for i in range(N)
    ]
    rows = [{**row, "answer": answers[row["label"]]} for row in rows]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_tasks(tmp_path / "tasks", tmp_path / "data.jsonl")
    return [str(workspace.teacher), "--include-path", str(tmp_path / "tasks")]


@needs_lm_eval
def test_guessing_is_scored_as_the_task_scores_answers(
    tmp_path: Path, local: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    single = [name for name in TASKS if name not in ("local_choice", "local_contexts")]
    arguments = [*local, "--tasks", "local_group", *single, "--batch-size", "2", "--out", str(out)]
    assert run(command.main, command.parser(), arguments) == 0
    results = json.loads(out.read_text())
    found = results["tasks"]
    assert found.keys() == TASKS.keys()
    majorities = {name: result["majority"] for name, result in found.items()}
    right = pytest.approx(4 / N)
    none = {"local_last": None, "local_word": None, "local_text": None}
    assert majorities == {"local_choice": right, "local_contexts": right, "local_words": right, **none}
    assert {result["n_documents"] for result in found.values()} == {N}
    # What the figures are of.
    assert results["lm_eval"] == metadata.version("lm_eval")
    assert {result["version"] for result in found.values()} == {"2.5"}
    assert {name: result["n_shot"] for name, result in found.items()} == {**dict.fromkeys(TASKS, 0), "local_choice": 1}
    # Perplexities are kept.
    assert found["local_word"]["others"]["perplexity,none"] > 1
    assert found["local_word"]["acc"] is not None
    assert found["local_text"]["others"].keys() >= {"word_perplexity,none", "bits_per_byte,none"}
    assert found["local_choice"]["others"] == {}
    printed = capsys.readouterr().out
    assert f"local_word perplexity {found['local_word']['others']['perplexity,none']:.4g}" in " ".join(printed.split())


@needs_lm_eval
def test_a_few_documents_for_a_quick_look(tmp_path: Path, local: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    arguments = [*local, "--tasks", "local_contexts", "--limit", "5", "--out", str(out)]
    assert run(command.main, command.parser(), arguments) == 0
    found = json.loads(out.read_text())["tasks"]["local_contexts"]
    assert (found["n_documents"], found["majority"]) == (5, pytest.approx(0.8))
    assert found["acc"] * 5 == pytest.approx(round(found["acc"] * 5))
    assert run(command.main, command.parser(), [*local, "--tasks", "local_chioce"]) == 1
    assert "lm-eval has no task local_chioce" in capsys.readouterr().err
    (tmp_path / "data.jsonl").unlink()
    assert run(command.main, command.parser(), [*local, "--tasks", "local_choice"]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def test_without_lm_eval_one_is_told_how_to_get_it(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "lm_eval":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'fbitrain\[eval\]'"):
        run_tasks(load_lm(workspace.teacher, torch.float32), workspace.teacher, ["piqa"])
