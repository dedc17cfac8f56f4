"""Steps that are not trained on: a loss or gradient that is not finite or far above its running mean (train.on_spike).

Everything here is a function of numbers that all ranks share and of what a checkpoint keeps, so that a run that is
resumed judges each step as it was judged before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fbitrain.base.errors import UserError

if TYPE_CHECKING:
    from fbitrain.config import Config, TrainConfig

MOST_IN_A_ROW = 10  # steps left out one after the other; then it is no spike


class SpikeError(UserError):
    """A step whose update must not be made; every rank raises it, before the update."""

    restart_mends = False


@dataclass(frozen=True)
class RunningMeans:
    """Of the steps that were trained on, the latest counting most; a checkpoint keeps it."""

    loss: float = 0.0
    grad_norm: float = 0.0
    n_steps: int = 0
    left_out: int = 0  # steps since the last one that was trained on

    def after(self, loss: float, grad_norm: float, window: int) -> RunningMeans:
        """With one more step: an exponential mean that forgets as fast as one over `window` steps."""
        n = self.n_steps + 1
        share = 1 / min(n, window)
        return RunningMeans(
            self.loss + share * (loss - self.loss), self.grad_norm + share * (grad_norm - self.grad_norm), n
        )


def fault_of_loss(train: TrainConfig, means: RunningMeans, loss: float) -> str:
    """What is wrong with a step's loss, the mean over its tokens in nats; empty if nothing."""
    if not math.isfinite(loss):
        return "is not finite"
    if train.spike_loss and means.n_steps >= train.spike_window and loss > means.loss + train.spike_loss:
        return f"is {loss:.4g}, more than train.spike_loss={train.spike_loss:g} above its running mean {means.loss:.4g}"
    return ""


def fault_of_gradient(train: TrainConfig, means: RunningMeans, norm: float) -> str:
    """What is wrong with the norm of a step's gradient before clipping; empty if nothing."""
    if not math.isfinite(norm):
        return "is not finite"
    if train.spike_grad_norm and means.n_steps >= train.spike_window and norm > train.spike_grad_norm * means.grad_norm:
        limit = f"train.spike_grad_norm={train.spike_grad_norm:g}"
        return f"is {norm:.4g}, more than {limit} times its running mean {means.grad_norm:.4g}"
    return ""


def require_progress(means: RunningMeans, fault: str) -> None:
    """Raises SpikeError after MOST_IN_A_ROW steps that were left out for a fault of their own."""
    if means.left_out >= MOST_IN_A_ROW:
        raise SpikeError(f"{fault}, and so were the {MOST_IN_A_ROW} steps before it; stopped before the update")


def suspects(config: Config, step: int) -> str:
    """What to do about such a number at 1-based `step`; at the first one no learning rate is to blame."""
    if step > 1:
        return "lower optim.lr or check the data (train.on_spike=skip leaves such steps out)"
    start = f"model.pretrained={config.model.pretrained}" if config.model.pretrained else "model.init_std"
    teacher = f"the teacher {config.distill.teacher}, " if config.distill.needs_teacher else ""
    return f"nothing was trained before it: check {teacher}what the student starts from ({start}) and the data"
