"""The means that a log line holds: sums kept on the device, and one reduction over the ranks per log line."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist
from torch import Tensor

from fbitrain.config import DistillConfig
from fbitrain.distill import DistillMetrics
from fbitrain.step_clock import ACTIVITIES, StepClock
from fbitrain.stragglers import rank_scalars

_SUMS = ("kd", "teacher_entropy", "label_ce", "teacher_label_ce", "top1_agreement", "hidden_mse", "tokens")


class IntervalMeans:
    """Means over the micro-batches and steps since the last log line. Nothing waits for the device before `close`."""

    def __init__(self, device: torch.device, clock: StepClock) -> None:
        self._device = device
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begins a new interval, the clock stopped."""
        self._sums = torch.zeros(len(_SUMS) + 2, dtype=torch.float64, device=self._device)  # + loss, grad norm
        self._micro_batches = self._steps = 0
        self._before = self._sums.clone(), 0
        self._seconds = 0.0
        self._clock.take()
        self._started: float | None = None

    def run(self) -> None:
        """(Re)starts the clock, which evaluation and saving stop."""
        self._started = time.perf_counter()

    def pause(self, activity: str) -> None:
        """Stops the clock for what is no part of a step."""
        self._clock.enter(activity)
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def add_micro_batch(self, loss: Tensor, metrics: DistillMetrics | None) -> None:
        """loss: with its weight in the step; metrics: None where the micro-batch had no sequences."""
        parts = [getattr(metrics, name, 0.0) for name in _SUMS]
        self._sums[:-1] += torch.stack(
            [torch.as_tensor(p, dtype=torch.float64, device=self._device) for p in (*parts, loss.detach())]
        )
        self._micro_batches += 1

    def add_step(self, grad_norm: Tensor) -> None:
        self._sums[-1] += grad_norm
        self._steps += 1

    def begin_step(self) -> None:
        self._before = self._sums.clone(), self._micro_batches

    def drop_step(self) -> None:
        """Takes back the micro-batches of the step that is going on."""
        self._sums, self._micro_batches = self._before

    @property
    def empty(self) -> bool:
        """Whether no step was trained on since the last log line; the same on every rank."""
        return not self._steps

    def close(self, distill: DistillConfig) -> dict[str, float]:
        """Means over the interval and all ranks, then starts a new one. Collective."""
        self.pause("logging")
        world = dist.get_world_size()
        times = torch.zeros(world, len(ACTIVITIES), dtype=torch.float64)
        times[dist.get_rank()] = self._clock.take()
        shared = torch.cat([self._sums, times.flatten().to(self._device)])
        dist.all_reduce(shared)
        sums, times = shared[: len(self._sums)], shared[len(self._sums) :].view_as(times)
        values = dict(zip((*_SUMS, "loss", "grad_norm"), sums.tolist(), strict=True))
        tokens = max(values["tokens"], 1.0)
        scalars = {
            "train/loss": values["loss"] / (world * max(self._micro_batches, 1)),
            "train/label_ce": values["label_ce"] / tokens,
            "optim/grad_norm": values["grad_norm"] / (world * max(self._steps, 1)),
            "speed/tokens_per_s": values["tokens"] / max(self._seconds, 1e-9),
        }
        if distill.hidden_weight > 0:
            scalars["train/hidden_mse"] = values["hidden_mse"] / tokens
        if distill.kd_weight > 0:
            scalars["train/kd"] = values["kd"] / tokens
        # A cache keeps a few words of each distribution: the cross-entropy can be estimated, the rest cannot.
        if distill.kd_weight > 0 and not distill.cache:
            scalars |= {
                "train/top1_agreement": values["top1_agreement"] / tokens,
                "teacher/entropy": values["teacher_entropy"] / tokens,
                "teacher/label_ce": values["teacher_label_ce"] / tokens,
            }
        self.restart()
        self.run()
        return scalars | rank_scalars(times)
