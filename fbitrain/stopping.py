"""When the ranks save and when they stop: a signal, the end of the job's time, checkpoint.every_minutes.

What one rank's clock or signal handler says, all learn in an all-reduce, and act on it after the same (micro-)batch.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from fbitrain import slurm
from fbitrain.config import CheckpointConfig
from fbitrain.ranks import DelayedFlag


class Stop:
    """Remembers SIGTERM and Ctrl-C and looks at the clock until the ranks agree to stop; says when to save.

    Of clocks only rank 0's counts: those of several nodes differ.
    """

    def __init__(self, settings: CheckpointConfig, device: torch.device) -> None:
        self.agreed = False
        self.save_due = False  # agreed, too
        self.reason = "a signal to another rank"
        self._settings = settings
        self._has_clock = dist.get_rank() == 0
        self._job_end = slurm.job_end()
        self._signalled_at: float | None = None
        self._flag = DelayedFlag(device)
        self._n_micro_batches = 1
        self._step_began = self._saved_at = time.monotonic()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
            self.reason = f"signal {signal.Signals(number).name}"
            # Not print: the signal may have come in the middle of one.
            os.write(1, f"{signal.Signals(number).name}: saving after this step, then stopping\n".encode())

    def saved(self) -> None:
        """A checkpoint has just been written, or need not be: checkpoint.every_minutes counts from here."""
        self._saved_at = time.monotonic()
        self.save_due = False

    def begin_step(self, n_micro_batches: int) -> None:
        self._n_micro_batches = n_micro_batches
        self._step_began = time.monotonic()
        self._flag.forget()

    def wishes(self) -> tuple[bool, bool]:
        """What this rank has to say near the end of a step: stop after it, save after it."""
        minutes = self._settings.every_minutes
        now = time.monotonic()
        due = self._has_clock and 0 < 60 * minutes <= now - self._saved_at
        # Another step as long as this one would end too late.
        return self._signalled_at is not None or self._job_ends_within(now - self._step_began), due

    def agree(self, stop: bool, save: bool) -> None:
        """Takes what the ranks' wishes came to."""
        self.agreed, self.save_due = stop, save

    def drops_step(self, left: int) -> bool:
        """Whether the ranks stop in the middle of the step, `left` micro-batches before its end. Collective.

        The answer is to what was asked one micro-batch ago: so nobody waits for it.
        """
        self.agreed = self._flag.exchange(self._too_late(left))
        return self.agreed

    def _too_late(self, left: int) -> bool:
        """Whether saving cannot wait for the step's end."""
        if self._signalled_at is None:
            return self._job_ends_within(0.0)
        now = time.monotonic()
        one = (now - self._step_began) / (self._n_micro_batches - left)
        return now + left * one > self._signalled_at + self._settings.stop_within_s

    def _job_ends_within(self, seconds: float) -> bool:
        """Whether less than `seconds` and the margin are left of the job's time, by rank 0's clock."""
        if not self._has_clock or self._job_end is None:
            return False
        if time.time() + seconds < self._job_end - self._settings.margin_s:
            return False
        self.reason = "the end of the job's time"
        return True
