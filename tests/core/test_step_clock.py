"""Where a rank is, how long it may stay there, and how a step's seconds are split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fbitrain import step_clock
from fbitrain.collectives import timed_collective
from fbitrain.step_clock import ACTIVITIES, GRACE_S, DeviceSpans, StepClock

CPU = torch.device("cpu")


@pytest.fixture
def tick(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock that the host's spans are read from."""
    now = [100.0]
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


@pytest.fixture
def timeouts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time-outs that the process groups were given."""
    given: list[float] = []
    monkeypatch.setattr(step_clock, "set_timeouts", given.append)
    return given


def take_step(clock: StepClock, tick: Callable[[float], None], step: int, seconds: float, **options: Any) -> None:
    """One micro-batch of `seconds` in all, of which the backward pass waits a quarter."""
    clock.begin_step(step, 1, **options)
    for activity, share in (("data", 0.125), ("teacher", 0.125), ("forward", 0.25), ("backward", 0.125)):
        clock.enter(activity, 1)
        tick(share * seconds)
    with clock.waiting("all_reduce"):
        tick(0.25 * seconds)
    clock.enter("optimizer")
    tick(0.125 * seconds)
    clock.end_step()


def test_a_steps_seconds_are_split(tick: Callable[[float], None], timeouts: list[float]) -> None:
    clock = StepClock(CPU, 300, 1800)
    tick(50)  # before the first step
    take_step(clock, tick, 1, 8.0)
    clock.enter("saving")
    with clock.waiting("gather"):
        tick(50)
    take_step(clock, tick, 2, 16.0)
    tick(50)
    taken = dict(zip(ACTIVITIES, clock.take().tolist(), strict=True))
    assert taken == {"data": 1.5, "teacher": 1.5, "forward": 3, "backward": 1.5, "optimizer": 1.5, "waiting": 3}
    assert clock.take().tolist() == [0.0] * len(ACTIVITIES)


def test_short_waits_begin_with_the_second_step(tick: Callable[[float], None], timeouts: list[float]) -> None:
    clock = StepClock(CPU, 300, 1800)
    take_step(clock, tick, 1, 500)  # compiles
    assert clock.limit_s == 1800
    take_step(clock, tick, 2, 8)
    assert clock.limit_s == 300
    clock.enter("logging")
    assert clock.limit_s == 300
    for activity in ("saving", "evaluating", "rewinding", "profiling"):
        clock.enter(activity)
        assert clock.limit_s == 1800
        clock.begin_step(3, 1)
        assert clock.limit_s == 300
    assert timeouts == [300 + GRACE_S, *([1800 + GRACE_S, 300 + GRACE_S] * 4)]


def test_steps_that_are_slow_by_nature_may_take_longer(tick: Callable[[float], None], timeouts: list[float]) -> None:
    clock = StepClock(CPU, 300, 1800)
    take_step(clock, tick, 1, 500)
    take_step(clock, tick, 2, 200)
    take_step(clock, tick, 3, 900, compiles=True)
    clock.begin_step(4, 1)
    assert clock.limit_s == 600


def test_a_first_step_that_is_left_out_compiles_nothing(tick: Callable[[float], None], timeouts: list[float]) -> None:
    clock = StepClock(CPU, 300, 1800)
    clock.begin_step(1, 1)
    clock.enter("data", 1)
    clock.end_step()
    clock.begin_step(2, 1)
    assert clock.limit_s == 1800


def test_a_short_wait_is_never_the_longer_one() -> None:
    clock = StepClock(CPU, 300, 60)
    assert (clock.limit_s, clock._short_s) == (60, 60)


def test_a_position_says_where_and_after_what() -> None:
    clock = StepClock(CPU, 300, 1800)
    assert str(clock.position) == "starting at step 0"
    clock.begin_step(5, 4)
    clock.enter("backward", 2)
    with clock.waiting("all_gather"), clock.waiting("all_gather_into_tensor"):
        assert str(clock.position) == "backward in micro-batch 2 of 4 of step 5, in collective 1 (all_gather)"
    clock.enter("data", 3)
    assert str(clock.position) == "data in micro-batch 3 of 4 of step 5, after collective 1 (all_gather)"


def test_a_collective_and_the_wait_for_its_handle_are_marked() -> None:
    class Handle:
        done = True

        def wait(self) -> str:
            return str(clock.position)

    clock = StepClock(CPU, 300, 1800)
    call = timed_collective("reduce", lambda blocks: None if blocks else Handle(), clock.waiting)
    assert call(True) is None
    handle = call(False)
    assert handle.done
    assert handle.wait() == "starting at step 0, in collective 3 (the end of reduce)"


class Event:
    """As CUDA's: it is given the time when the device gets to it, here the order of the records."""

    now = 0.0

    def record(self) -> None:
        Event.now += 1000.0
        self.at = Event.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_spans_on_a_device_are_read_from_events_that_are_used_again() -> None:
    made: list[Event] = []

    def event() -> Event:
        made.append(Event())
        return made[-1]

    stream = "the step's"
    spans = DeviceSpans(event, lambda: stream)
    assert spans.take() == {}
    for _ in range(3):
        for name in ("data", "forward", "data", ""):
            spans.switch(name)
        stream = "another"
        spans.switch("waiting")
        stream = "the step's"
        taken = spans.take()
        assert (taken["data"], taken["forward"]) == (2.0, 1.0)
        assert "waiting" not in taken
    assert len(made) < 8
