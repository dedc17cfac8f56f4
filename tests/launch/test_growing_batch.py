"""Real launches of a batch that changes its size three times, killed and resumed between two of them.

Steps 1 and 2 have 48 tokens, step 3 has 144, steps 4 and 5 have 240 and step 6 has 96: 1, 3, 5 and 2 micro-batches on
two ranks, sizes of which none is a multiple of the one before. The stream's second phase begins with step 4. There are
two lanes, so that a step takes as many sequences of each on any number of ranks.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.launch.run_folders import copy_run

pytestmark = pytest.mark.launch
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
TOKENS = [48, 48, 144, 240, 240, 96]
STREAM = ("data.n_lanes=2", "data.phases=[{from_step: 3, weights: {alpha: 0}}]")
GROWING = (
    "train.global_batch_tokens=48",
    "train.batch_changes=["
    "{from_step: 3, global_batch_tokens: 144}, "
    "{from_step: 4, global_batch_tokens: 240}, "
    "{from_step: 6, global_batch_tokens: 96}]",
    *STREAM,
    "debug.log_documents=true",
)


@pytest.fixture(scope="module")
def grown(launch: Any) -> Any:
    """Six uninterrupted steps, stage 1, two ranks."""
    return launch("grown", *GROWING, deepspeed=True)


def test_every_step_has_its_size_and_every_phase_its_steps(grown: Any) -> None:
    logged = {line["step"]: line["tokens"] for line in grown.metrics if "train/loss" in line}
    assert logged == {step: sum(TOKENS[:step]) for step in range(1, 7)}
    for rank in (0, 1):
        micro_batches = Counter(line["step"] for line in grown.batches(rank))
        assert [micro_batches[step] * 2 * 24 for step in range(1, 7)] == TOKENS
        documents = (grown.run_dir / f"documents_rank{rank:05d}.jsonl").read_text().splitlines()
        for line in map(json.loads, documents):
            sources = {name.partition("/")[0] for name in line["documents"]}
            assert line["step"] <= 3 or sources <= {"beta"}, line
        assert any("alpha/" in line for line in documents), "the first phase shows nothing"
    marker = json.loads((grown.run_dir / "FINISHED.json").read_text())
    assert marker["tokens"] == sum(TOKENS)


def test_a_kill_between_two_sizes_changes_nothing(launch: Any, grown: Any) -> None:
    killed = launch.start("killed", *GROWING, env={"FAULT": "kill_at_step_4"}, script=FAULTS, deepspeed=True)
    assert killed.wait() != 0
    assert max(killed.losses) == 3
    again = launch("killed", *GROWING)
    assert "resumed from" in again.output
    assert again.losses == grown.losses
    for rank in (0, 1):
        wanted = [batch for batch in grown.batches(rank) if batch["step"] > 3]
        assert [batch for batch in again.batches(rank) if batch["step"] > 3][-len(wanted) :] == wanted


def test_a_step_is_what_it_is_where_all_have_its_size(launch: Any, grown: Any) -> None:
    """Steps 4 and 5 by an engine that began with their number of micro-batches, on a stream that counts anew."""
    copy_run(grown.run_dir, launch.runs / "constant", step=3)
    constant = launch("constant", "train.global_batch_tokens=240", *STREAM)
    assert "train.batch_changes" in constant.output, "the changed setting is not said"
    for step in (4, 5):
        assert constant.losses[step] == grown.losses[step]
        for rank in (0, 1):
            found = [batch for batch in constant.batches(rank) if batch["step"] == step]
            wanted = [batch for batch in grown.batches(rank) if batch["step"] == step]
            assert found[-5:] == wanted


@pytest.mark.parametrize(
    ("stage", "ranks", "offload"),
    [
        (3, 1, False),
        *(
            pytest.param(*more, marks=pytest.mark.slow)
            for more in ((0, 2, False), (2, 2, False), (1, 1, True), (2, 2, True), (3, 2, True))
        ),
    ],
)
def test_goes_on_under_other_stages_and_ranks(launch: Any, grown: Any, stage: int, ranks: int, offload: bool) -> None:
    name = f"moved-{stage}-{ranks}-{offload}"
    copy_run(grown.run_dir, launch.runs / name, step=3)
    settings = (f"engine.zero_stage={stage}", f"engine.offload_optimizer={str(offload).lower()}")
    run = launch(name, *GROWING, *settings, ranks=ranks)
    assert run.losses == pytest.approx(grown.losses, rel=3e-4)


@pytest.mark.slow
def test_an_old_run_may_begin_to_grow(launch: Any) -> None:
    """A checkpoint and a data state of one size of the batch go on with another, at the step that was asked for."""
    constant = ("train.global_batch_tokens=96", *STREAM, "train.total_steps=3")
    launch("old", *constant)
    grown = "train.batch_changes=[{from_step: 5, global_batch_tokens: 192}]"
    run = launch("old", "train.global_batch_tokens=96", *STREAM, grown)
    logged = {line["step"]: line["tokens"] for line in run.metrics if "train/loss" in line}
    assert logged == {1: 96, 2: 192, 3: 288, 4: 384, 5: 576, 6: 768}
