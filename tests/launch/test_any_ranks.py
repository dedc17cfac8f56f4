"""Real launches on numbers of ranks that divide neither the batch nor the lanes: the steps are those of one rank."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch
# Steps of 13 sequences from 4 lanes. Of three ranks the first has two lanes, so it draws about twice as many.
ODD = (
    *("train.global_batch_tokens=312", "debug.log_documents=true", "train.micro_batch_size=2"),
    *("optim.schedule=wsd", "optim.cooldown_steps=0"),  # rates that do not depend on total_steps
)


def documents(run_dir: Path) -> dict[int, list[str]]:
    """The documents that begin in each step, over all ranks; of a step that was repeated each time is listed."""
    found = defaultdict(list)
    for path in run_dir.glob("documents_rank*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            found[line["step"]] += line["documents"]
    return {step: sorted(names) for step, names in found.items()}


@pytest.fixture(scope="module")
def alone(launch: Any) -> Any:
    return launch("alone", *ODD, ranks=1)


@pytest.mark.parametrize(
    ("stage", "rank_counts"), [(1, (3, 2)), *(pytest.param(s, (4, 3, 2), marks=pytest.mark.slow) for s in (0, 2, 3))]
)
def test_other_numbers_of_ranks_train_the_same_steps(
    launch: Any, alone: Any, stage: int, rank_counts: tuple[int, ...]
) -> None:
    options = (*ODD, f"engine.zero_stage={stage}", "checkpoint.every=100")
    name = f"stage{stage}"
    for i, ranks in enumerate(rank_counts, 1):
        run = launch(name, *options, f"train.total_steps={6 * i // len(rank_counts)}", ranks=ranks)
    assert documents(run.run_dir) == documents(alone.run_dir)
    assert run.losses == pytest.approx(alone.losses, rel=3e-4)
    for key in ("train/label_ce", "optim/grad_norm", "tokens"):
        assert of_steps(run, key) == pytest.approx(of_steps(alone, key), rel=1e-3), key


def of_steps(run: Any, key: str) -> dict[int, float]:
    return {line["step"]: line[key] for line in run.metrics if "train/loss" in line}
