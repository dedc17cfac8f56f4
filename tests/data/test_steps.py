"""Steps and sequences of a batch that grows; phases that begin at steps; states that meet other sizes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fbitrain.data.config import DataConfig, PhaseConfig
from fbitrain.data.loader import TokenLoader
from fbitrain.data.streaming.plan import find_sources, plan_lanes
from fbitrain.data.streaming.steps import StepSizes, dealt
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


def begun(
    data: DataConfig, tokenizer: str, world_size: int, steps: list[int], states: Any = None, sizes: Any = GROWING
) -> Any:
    """Rank by rank the sources of the documents that begin in each of the steps, which have so many sequences, and the
    states behind them."""
    found, ended = [], []
    for rank in range(world_size):
        options = {"sequences_per_step": sizes, "log_documents": True, "states": states}
        with rank_loader(data, tokenizer, rank, world_size, **options) as loader:
            begins = []
            for n_sequences in steps:
                draw_step(loader, n_sequences)
                begins.append({name.partition("/")[0] for name in loader.take_documents()})
            found.append(begins)
            ended.append(json.loads(json.dumps(loader.state())))
    return found, ended


def draw_step(loader: TokenLoader, n_sequences: int) -> list[list[int]]:
    """What one rank draws of a step."""
    return [row for _ in range(loader.begin_step(n_sequences)) for row in next(loader).tolist()]


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 2), (1, 2), (2, 1), (3, 4)])
def test_the_phase_holds_on_any_number_of_ranks(
    phased: DataConfig, byte_tokenizer: str, first: int, second: int
) -> None:
    """12 sequences, which are 3 steps, then a resume, then the fourth step, and the phase."""
    _, states = begun(phased, byte_tokenizer, first, [4, 4, 4])
    assert {state["drawn"] for state in states} == {12}
    found, _ = begun(phased, byte_tokenizer, second, [8, 20], states)
    assert any("web" in before for before, _ in found)
    assert all(after <= {"code"} for _, after in found)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(legs=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 23)), min_size=1, max_size=6))
def test_a_step_holds_the_same_sequences_on_any_number_of_ranks(
    data: DataConfig, byte_tokenizer: str, legs: list[tuple[int, int]]
) -> None:
    """Each leg is one step of so many sequences on so many ranks, resumed from the leg before."""
    states = None
    with rank_loader(data, byte_tokenizer) as alone:
        for world_size, n_sequences in legs:
            drawn, ended, n_batches = [], [], set()
            for rank in range(world_size):
                with rank_loader(data, byte_tokenizer, rank, world_size, states=states) as loader:
                    n_batches.add(loader.begin_step(n_sequences))
                    batches = [next(loader).tolist() for _ in range(max(n_batches))]
                    assert all(len(batch) <= 2 for batch in batches)
                    drawn += [row for batch in batches for row in batch]
                    ended.append(json.loads(json.dumps(loader.state())))
            assert len(n_batches) == 1, "ranks would wait for each other"
            assert sorted(drawn) == sorted(draw_step(alone, n_sequences))
            states = ended


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


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_other_sizes_of_the_past_keep_the_steps(phased: DataConfig, byte_tokenizer: str, ranks: int) -> None:
    """After 3 steps of 4 sequences the run goes on as if each had had 20: the phase is still one step away."""
    _, states = begun(phased, byte_tokenizer, ranks, [4, 4, 4])
    found, ended = begun(phased, byte_tokenizer, ranks, [20, 12], states, sizes=20)
    assert ended[0]["drawn"] == 3 * 20 + 32
    assert all("web" in before for before, _ in found)
    assert all(after <= {"code"} for _, after in found)


def test_lanes_are_counted_in_the_order_they_are_drawn(phased: DataConfig, byte_tokenizer: str) -> None:
    """12 sequences of 5 lanes: the next one is lane 2's, and with other sizes it is the first after 3 steps."""
    _, states = begun(phased, byte_tokenizer, 1, [4, 4, 4])
    with rank_loader(phased, byte_tokenizer, states=states, sequences_per_step=20) as loader:
        state = loader.state()
    assert state["next_lane"] == 2
    in_turn = [state["lanes"][str(lane)]["sequence"] for lane in (2, 3, 4, 0, 1)]
    assert in_turn == [60, 61, 62, 63, 64]


@given(st.integers(0, 8), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_sequences_are_dealt_one_by_one(first: int, n_sequences: int, n_lanes: int, world_size: int) -> None:
    counted = [0] * world_size
    for i in range(n_sequences):
        counted[(first % n_lanes + i) % n_lanes % world_size] += 1
    assert dealt(first % n_lanes, n_sequences, n_lanes, world_size) == counted
