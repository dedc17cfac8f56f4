"""debug.profile_steps: a trace of some steps for Perfetto or chrome://tracing, and on GPUs a snapshot of memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from fbitrain.base.files import replacing
from fbitrain.base.optional_writes import OptionalWrites
from fbitrain.config import Config
from fbitrain.metrics import IntervalMeans
from fbitrain.ranks import say

MEMORY_EVENTS = 100_000  # newest allocations and frees that a snapshot holds, with their stacks


class StepProfile:
    """Profiles one stretch of steps on this rank; does nothing where none are named. A full disk does not end a run."""

    def __init__(self, config: Config, rank: int, device: torch.device, interval: IntervalMeans) -> None:
        self._first, self._last = config.debug.profile_steps or (0, 0)
        self._folder = config.run_dir / "profile"
        self._name = f"steps_{self._first}_to_{self._last}_rank_{rank}"
        self._on_gpu = device.type == "cuda"
        self._interval = interval  # whose clock stops meanwhile
        self._writes = OptionalWrites(f"the profile in {self._folder}")
        self._profile: profile | None = None

    def before(self, step: int) -> None:
        """Begins to record if `step` is the first that is asked for, or a resumed run's first among them."""
        if self._profile or not self._first <= step <= self._last:
            return
        self._interval.pause("profiling")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = profile(activities=activities, profile_memory=not self._on_gpu)
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        self._profile.start()
        self._interval.run()

    def after(self, step: int) -> None:
        """Writes the files behind the last step that is asked for."""
        if self._profile is None or step < self._last:
            return
        self._interval.pause("profiling")
        recorded, self._profile = self._profile, None
        recorded.stop()
        self._writes(lambda: self._write(recorded))
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        say(f"profiled steps {self._first} to {self._last}: see {self._folder}")
        self._interval.run()

    def _write(self, recorded: profile) -> None:
        self._folder.mkdir(exist_ok=True)
        with replacing(self._folder / f"{self._name}.json") as path:
            recorded.export_chrome_trace(str(path))
            _require_written(path)
        if self._on_gpu:
            with replacing(self._folder / f"{self._name}_memory.pickle") as path:
                torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Ends a recording whose last step did not come; it is not written."""
        if self._profile:
            self._profile.stop()
            self._profile = None
            say(f"the run ended before step {self._last}: the profile from step {self._first} on is not written")


def _require_written(path: Path) -> None:
    """Raises OSError where the profiler, which only warns of a full disk, cut its file short."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 16), 2)
        if not file.read().rstrip().endswith(b"}"):
            raise OSError(f"{path.name} was cut short")
