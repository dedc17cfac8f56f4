"""Steps and sequences of a batch that grows; phases that begin at steps; states that meet other sizes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from fbitrain.data.config import DataConfig, PhaseConfig
from fbitrain.data.streaming.plan import find_sources, plan_lanes
from fbitrain.data.streaming.steps import StepSizes
from tests.data.corpora import rank_loader, take

GROWING = [(0, 4), (3, 8), (4, 20), (7, 4)]  # sequences per step


@pytest.mark.parametrize("sizes", [1, 6, [(0, 6)], GROWING, [(0, 3), (1, 9)]])
def test_steps_and_sequences_are_counted_one_by_one(sizes: Any) -> None:
    of = StepSizes.of(sizes)
    spans = [(0, sizes)] if isinstance(sizes, int) else sizes
    drawn = 0
    for step in range(12):
        assert of.sequences_after(step) == drawn
        size = next(size for start, size in reversed(spans) if start <= step)
        for more in range(size):
            assert of.steps_within(drawn + more) == step
        drawn += size
    assert StepSizes.of(json.loads(json.dumps(of.to_json()))) == of


def test_one_size_is_written_as_it_always_was() -> None:
    assert StepSizes.of(0).to_json() == 0
    assert StepSizes.of(8).to_json() == 8
    assert StepSizes.of([(0, 8)]).to_json() == 8
    assert StepSizes.of(GROWING).to_json() == [list(span) for span in GROWING]


def test_a_phase_begins_where_its_step_does(data: DataConfig) -> None:
    phased = dataclasses.replace(data, phases=[PhaseConfig(step, {"web": 9.0 + step}) for step in (2, 3, 5, 9)])
    plan = plan_lanes(phased, find_sources(phased), sequences_per_step=GROWING)[0]
    assert [phase.first_sequence for phase in plan.phases] == [0, 8, 12, 40, 12 + 8 + 60 + 8]


@pytest.fixture
def phased(data: DataConfig) -> DataConfig:
    """After 4 steps, 20 sequences of GROWING, only `code` is read."""
    return dataclasses.replace(data, phases=[PhaseConfig(4, {"web": 0})])


def begun(data: DataConfig, tokenizer: str, world_size: int, n: int, states: Any = None, sizes: Any = GROWING) -> Any:
    """The sources of the documents that begin in each rank's next `n` batches of two, and the states behind them."""
    found, ended = [], []
    for rank in range(world_size):
        options = {"sequences_per_step": sizes, "log_documents": True, "states": states}
        with rank_loader(data, tokenizer, rank, world_size, **options) as loader:
            batches = []
            for _ in range(n):
                next(loader)
                batches.append({name.partition("/")[0] for name in loader.take_documents()})
            found.append(batches)
            ended.append(json.loads(json.dumps(loader.state())))
    return found, ended


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 2), (1, 2), (2, 1)])
def test_the_phase_holds_on_any_number_of_ranks(
    phased: DataConfig, byte_tokenizer: str, first: int, second: int
) -> None:
    """12 sequences, which are 3 steps, then a resume, then 8 of the fourth step, and the phase."""
    _, states = begun(phased, byte_tokenizer, first, 6 // first)
    assert {state["drawn"] for state in states} == {12}
    found, _ = begun(phased, byte_tokenizer, second, 20 // second, states)
    for batches in found:
        border = 4 // second
        assert any("web" in sources for sources in batches[:border])
        assert all(sources <= {"code"} for sources in batches[border:])


def test_a_resume_across_a_change_is_bit_exact(phased: DataConfig, byte_tokenizer: str) -> None:
    whole, _ = take(rank_loader(phased, byte_tokenizer, sequences_per_step=GROWING), 30)
    for stop in (2, 6, 10, 11, 20):
        _, state = take(rank_loader(phased, byte_tokenizer, sequences_per_step=GROWING), stop)
        rest, _ = take(rank_loader(phased, byte_tokenizer, sequences_per_step=GROWING, states=[state]), 30 - stop)
        assert rest == whole[stop:]


def test_changes_that_are_yet_to_come_do_not_concern_the_place(phased: DataConfig, byte_tokenizer: str) -> None:
    """A run of one size, as any state of old is, begins to grow: what it drew stays as many steps."""
    _, state = take(rank_loader(phased, byte_tokenizer, sequences_per_step=4), 6)
    assert state["mixture"]["sequences_per_step"] == 4
    _, as_before = take(rank_loader(phased, byte_tokenizer, sequences_per_step=4, states=[state]), 1)
    _, growing = take(rank_loader(phased, byte_tokenizer, sequences_per_step=GROWING, states=[state]), 1)
    assert growing["drawn"] == as_before["drawn"] == 14
    assert growing["lanes"] == as_before["lanes"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_other_sizes_of_the_past_keep_the_steps(phased: DataConfig, byte_tokenizer: str, ranks: int) -> None:
    """After 3 steps of 4 sequences the run goes on as if each had had 20: the phase is still one step away."""
    _, states = begun(phased, byte_tokenizer, ranks, 6 // ranks)
    found, ended = begun(phased, byte_tokenizer, ranks, 16 // ranks, states, sizes=20)
    assert ended[0]["drawn"] == 3 * 20 + 16 * 2
    for batches in found:
        assert any("web" in sources for sources in batches[: 10 // ranks])
        assert all(sources <= {"code"} for sources in batches[10 // ranks :])


def test_lanes_are_counted_in_the_order_they_are_drawn(phased: DataConfig, byte_tokenizer: str) -> None:
    """12 sequences of 5 lanes: the next one is lane 2's, and with other sizes it is the first after 3 steps."""
    _, states = begun(phased, byte_tokenizer, 1, 6)
    with rank_loader(phased, byte_tokenizer, states=states, sequences_per_step=20) as loader:
        state = loader.state()
    assert state["next_lane"] == 2
    in_turn = [state["lanes"][str(lane)]["sequence"] for lane in (2, 3, 4, 0, 1)]
    assert in_turn == [60, 61, 62, 63, 64]
