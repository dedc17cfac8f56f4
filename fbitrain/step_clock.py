"""Where a rank is in its step, and how many seconds its steps spend on what.

The loop says what it enters; a position is what the watch of hangs.py reads and tells the other ranks. Nothing here
waits for a device: on GPUs the spans lie between events, which are read once per log line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fbitrain.process import set_timeouts

# What a step's seconds are spent on; `waiting` is for the other ranks, in collectives that block this one.
ACTIVITIES = ("data", "teacher", "forward", "backward", "optimizer", "waiting")
LONG = ("starting", "saving", "evaluating", "rewinding", "profiling")  # may take as long as the start of a run
GRACE_S = 30.0  # that collectives wait longer than the watch does, so that it can say first who hangs
SLOW_STEPS = 3.0  # times the longest step so far that a rank may be at one place, whatever the configured time


class Position(NamedTuple):
    """What a rank does. Ranks enter the same collectives in the same order: one that entered fewer is behind."""

    activity: str = "starting"
    step: int = 0
    micro_batch: int = 0  # from 1, of `n_micro_batches`
    n_micro_batches: int = 0
    collective: int = 0  # how many were entered so far
    name: str = ""  # of the last one
    inside: bool = False  # whether it is going on

    def __str__(self) -> str:
        words = [self.activity]
        if self.activity in ACTIVITIES:
            words.append(f"in micro-batch {self.micro_batch} of {self.n_micro_batches}")
        words.append(f"of step {self.step}" if self.activity in ACTIVITIES else f"at step {self.step}")
        where = "in" if self.inside else "after"
        return " ".join(words) + (f", {where} collective {self.collective} ({self.name})" if self.collective else "")


class StepClock:
    """Follows one rank through its steps.

    short_s: how long a rank may be at one place while steps run, in seconds; long_s: while it starts, compiles, saves
    or evaluates. The time-out of collectives follows.
    """

    def __init__(self, device: torch.device, short_s: float, long_s: float) -> None:
        self.position = Position()
        self.limit_s = self._long_s = long_s
        self._short_s = min(short_s, long_s)
        self._spans: HostSpans | DeviceSpans = DeviceSpans() if device.type == "cuda" else HostSpans()
        self._n_steps = 0
        self._longest_s = 0.0
        self._began = 0.0
        self._compiles = True
        self._has_run = False  # forward and backward: what is compiled in the first step is compiled

    def begin_step(self, step: int, n_micro_batches: int, *, compiles: bool = False) -> None:
        """compiles: whether torch.compile is likely to work in it, as in the first step of a process."""
        self._compiles = compiles or not self._has_run
        self._allow(self._long_s if self._compiles else max(self._short_s, SLOW_STEPS * self._longest_s))
        self._began = time.perf_counter()
        self.position = self.position._replace(step=step, micro_batch=0, n_micro_batches=n_micro_batches)

    def enter(self, activity: str, micro_batch: int | None = None) -> None:
        """Ends what was going on. micro_batch: from 1; None: the same as before."""
        before = self.position
        self.position = before._replace(
            activity=activity, micro_batch=before.micro_batch if micro_batch is None else micro_batch
        )
        self._spans.switch(activity if activity in ACTIVITIES else "")
        self._has_run |= activity == "backward"
        if activity in LONG:
            self._allow(self._long_s)

    def end_step(self) -> None:
        if not self._compiles:
            self._longest_s = max(self._longest_s, time.perf_counter() - self._began)
        self._n_steps += 1
        self.enter("between steps")

    @contextmanager
    def waiting(self, collective: str) -> Iterator[None]:
        """Around a call that may wait for other ranks; one inside another is the same collective."""
        before = self.position
        if before.inside:
            yield
            return
        self.position = before._replace(collective=before.collective + 1, name=collective, inside=True)
        self._spans.switch("waiting" if before.activity in ACTIVITIES else "")
        try:
            yield
        finally:
            self._spans.switch(before.activity if before.activity in ACTIVITIES else "")
            self.position = self.position._replace(inside=False)

    def take(self) -> Tensor:
        """Seconds per step since the last call, fp64 [len(ACTIVITIES)], on the CPU. Waits for the device."""
        sums, n_steps, self._n_steps = self._spans.take(), self._n_steps, 0
        return torch.tensor([sums.get(name, 0.0) for name in ACTIVITIES], dtype=torch.float64) / max(n_steps, 1)

    def _allow(self, seconds: float) -> None:
        if seconds != self.limit_s:
            self.limit_s = seconds
            set_timeouts(seconds + GRACE_S)


class HostSpans:
    """Seconds by name, by the host's clock: where the host does the computing."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._name, self._since = "", 0.0

    def switch(self, name: str) -> None:
        """Ends the span that is going on and begins one called `name`; an empty name: one that is not counted."""
        now = time.perf_counter()
        self._sums[self._name] = self._sums.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now

    def take(self) -> dict[str, float]:
        """The sums since the last call."""
        self.switch(self._name)
        sums, self._sums = self._sums, {}
        return sums


class DeviceSpans:
    """Seconds by name between events in the order of the device's work, which no step waits for.

    A span of `data` is what the device was idle for. Work on other streams is in whatever the stream of the step does
    meanwhile, so a collective that overlaps with computing is not in `waiting`.
    """

    def __init__(self, event: Callable[[], Any] | None = None, stream: Callable[[], Any] | None = None) -> None:
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
        self._stream = stream or torch.cuda.current_stream
        self._own = self._stream()
        self._marks: list[tuple[str, Any]] = []  # the name of a span, and the event at its beginning
        self._spare: list[Any] = []

    def switch(self, name: str) -> None:
        outside = bool(self._marks) and self._marks[-1][0] == name == ""  # as an evaluation's many collectives are
        if outside or self._stream() != self._own:
            return
        event = self._spare.pop() if self._spare else self._event()
        event.record()
        self._marks.append((name, event))

    def take(self) -> dict[str, float]:
        sums: dict[str, float] = {}
        if not self._marks:
            return sums
        self.switch(self._marks[-1][0])
        self._marks[-1][1].synchronize()
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            sums[name] = sums.get(name, 0.0) + begin.elapsed_time(end) / 1000  # milliseconds
        self._spare += [event for _, event in self._marks[:-1]]
        self._marks = self._marks[-1:]
        return sums
