"""How good a model is at lm-eval's tasks, and what guessing would give there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fbitrain.base.errors import UserError

NEVER = -1e4  # log-likelihood of the answers that are not given
Sample = Mapping[str, Any]  # a document as lm-eval logs it


@dataclass(frozen=True)
class TaskResult:
    """One lm-eval task. Accuracies are shares of 1; what a task does not report is None.

    majority is the accuracy of always giving the answer that is right most often: what acc must exceed to mean
    anything. It is None where there are no answers to choose from, and where the same one is right in every document.
    others: every other figure the task reports, such as perplexity, by lm-eval's name ("word_perplexity,none").
    """

    acc: float | None
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    majority: float | None
    n_documents: int
    n_shot: int | None = None
    version: str | None = None  # the task's, in lm-eval
    others: dict[str, float] = field(default_factory=dict)


def run_tasks(
    model: PreTrainedModel,
    folder: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    batch_size: int = 1,
    limit: int | None = None,
) -> dict[str, TaskResult]:
    """Runs lm-eval `tasks` (zero-shot unless a task says otherwise), with the tokenizer in the model's `folder`.

    include_path: a folder with YAML tasks of one's own. limit: documents per task, for a quick look.
    Raises UserError without lm-eval, for unknown tasks, and for data sets that cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("lm-eval is not installed, and --tasks needs it; pip install 'fbitrain[eval]'") from None
    from transformers import AutoTokenizer

    paths = str(include_path) if include_path else None
    # Without lm-eval's own 14,000 tasks, which take most of a minute to index, where they are not needed.
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(tasks) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=paths)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        raise UserError(
            f"lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them, --include-path adds some"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(
            f"the tokenizer in {folder} is none that transformers reads by itself, which lm-eval needs; "
            "give the model's folder a tokenizer.json without code of its own"
        ) from error
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        loaded = manager.load(list(tasks))
        inner = {name for children in loaded["group_map"].values() for name in children}
        outer = [item for name, item in {**loaded["tasks"], **loaded["groups"]}.items() if name not in inner]
        results = simple_evaluate(lm, tasks=outer, task_manager=manager, limit=limit, log_samples=True)
    except OSError as error:  # which a missing file and a hub out of reach both are
        raise UserError(
            f"the data of a task among {', '.join(tasks)} cannot be loaded ({error}); "
            "without network, describe local files in YAML tasks and pass --include-path"
        ) from error
    return task_results(results, loaded["tasks"])


def lm_eval_version() -> str:
    return metadata.version("lm_eval")


def task_results(results: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, TaskResult]:
    """Picks TaskResults out of what lm-eval returns for its `tasks`; groups have no samples and are left out."""
    picked = {}
    for name, logged in results["samples"].items():
        figures = _figures(results["results"][name])
        # A task with several filters logs each document once per filter.
        samples = list({sample["doc_id"]: sample for sample in logged}.values())
        version = results["versions"].get(name)
        picked[name] = TaskResult(
            acc=figures.pop("acc,none", None),
            acc_stderr=figures.pop("acc_stderr,none", None),
            acc_norm=figures.pop("acc_norm,none", None),
            acc_norm_stderr=figures.pop("acc_norm_stderr,none", None),
            majority=majority(tasks[name], samples),
            n_documents=len(samples),
            n_shot=results["n-shot"].get(name),
            version=None if version is None else str(version),
            others=figures,
        )
    return picked


def majority(task: Any, samples: Sequence[Sample]) -> float | None:
    """The accuracy that `task` gives to the best of its answers, by its number, given in every document.

    The task itself scores it: the right answer's number is the target, or the text, or an index into the choices. None
    where nothing is chosen, and where one answer is always right: it is not known by its number there.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not samples:
        return None
    scores: Counter[int] = Counter()
    for sample in samples:
        n_scored = len(sample["filtered_resps"])  # the choices, with mutual information once more without context
        for answer in range(len(task.doc_to_choice(sample["doc"]))):
            given = [(0.0 if i == answer else NEVER, i == answer) for i in range(n_scored)]
            scores[answer] += task.process_results(sample["doc"], given).get("acc", 0.0)
    best = max(scores.values(), default=0.0) / len(samples)
    return best if 0 < best < 1 else None


def _figures(reported: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among what lm-eval reports of a task, by "metric,filter"; "N/A" stands where there is no error."""
    return {key: float(value) for key, value in reported.items() if "," in key and isinstance(value, int | float)}
