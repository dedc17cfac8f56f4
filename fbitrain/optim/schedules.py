"""What changes with the step: learning rate, weight decay, tokens per step. Pure functions of the step, no torch.

A step is an optimizer step. Steps count from 1: step t is the t-th update of the run, T = train.total_steps the last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fbitrain.config_optim import OptimConfig
from fbitrain.data.streaming.steps import total_after

if TYPE_CHECKING:
    from fbitrain.config import Config, TrainConfig


def lr_at(config: Config, step: int) -> float:
    """Learning rate of step `step`, in the units of optim.lr: that of AdamW's parameters with a factor of 1."""
    return _lr(config.optim, config.train.total_steps, step)


def lr_shape(optim: OptimConfig, total_steps: int, step: int) -> float:
    """Learning rate of step `step` as a share of its peak optim.lr: what a rate with another peak is multiplied with.

    Between min_lr / lr and 1, but for the warm-up, which rises from 1 / warmup_steps. lr_at is computed without this
    division, so lr · lr_shape may differ from it in the last bit.
    """
    return _lr(optim, total_steps, step) / optim.lr


def decay_shape(optim: OptimConfig, total_steps: int, step: int) -> float:
    """Weight decay of step `step` as a share of its full value optim.weight_decay: in [0, 1], 1 but for two_stage.

    two_stage: ½·(1 - cos(π·t / (S - 1))) for t < S = optim.stage2_step, which is 1 at step S - 1; 0 from step S on.

    Source: the technical report of BitNet b1.58 2B4T (arXiv 2504.12285), section on the weight decay schedule. It says
    that in the first stage weight decay follows a cosine with a peak of 0.1, and that the second has none. Our reading
    is that it rises from 0 and is at its peak where the first stage ends; the report gives no formula.
    """
    del total_steps  # the other schedules' signature
    if optim.schedule != "two_stage":
        return 1.0
    if step >= optim.stage2_step:
        return 0.0
    return 0.5 * (1 - math.cos(math.pi * step / max(1, optim.stage2_step - 1)))


def _lr(optim: OptimConfig, total: int, step: int) -> float:
    """The rate in the units of optim.lr. Every schedule begins with lr · t / warmup_steps for t <= warmup_steps.

    With p the share of the steps after the warm-up that are done, (t - warmup_steps) / (T - warmup_steps):

    cosine     min_lr + (lr - min_lr) · ½·(1 + cos πp)
    linear     min_lr + (lr - min_lr) · (1 - p)
    wsd        lr, and in the last C = cooldown_steps min_lr + (lr - min_lr) · (T - t) / C (warm-up, stable, decay:
               MiniCPM, arXiv 2404.06395; a straight line in the last part: arXiv 2405.18392)
    two_stage  cosine before step S = stage2_step; from it on min_lr + (stage2_lr - min_lr) · ½·(1 + cos πq) with
               q = (t - S) / (T - S)

    two_stage is the schedule of BitNet b1.58 2B4T (arXiv 2504.12285). The report says: a standard cosine decay from a
    high peak; about midway through the tokens the rate drops abruptly and then follows a cosine with a much lower
    peak. Our reading: the first cosine is laid out over all T steps and cut off at S, so at midway it is about half
    down and the drop from there to stage2_lr is abrupt. Both cosines aim at min_lr. The report gives no numbers.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / max(1, optim.warmup_steps)
    if optim.schedule == "two_stage" and step >= optim.stage2_step:
        progress = (step - optim.stage2_step) / max(1, total - optim.stage2_step)
        return _half_cosine(optim.stage2_lr, optim.min_lr, progress)
    if optim.schedule == "wsd":
        left = max(0, total - step)
        if left >= optim.cooldown_steps:
            return optim.lr
        return optim.min_lr + (optim.lr - optim.min_lr) * left / optim.cooldown_steps
    progress = (step - optim.warmup_steps) / max(1, total - optim.warmup_steps)
    if optim.schedule == "linear":
        return optim.min_lr + (optim.lr - optim.min_lr) * (1 - min(1.0, progress))
    return _half_cosine(optim.lr, optim.min_lr, progress)


def _half_cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1, and there it stays."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batch_tokens_at(train: TrainConfig, step: int) -> int:
    """Tokens of step `step`, over all ranks: train.global_batch_tokens until train.batch_changes says otherwise."""
    return next(tokens for first, tokens in reversed(list(batch_spans(train))) if first <= max(1, step))


def tokens_after(train: TrainConfig, step: int) -> int:
    """Tokens of steps 1 to `step` together, over all ranks; 0 for step 0."""
    return total_after([(first - 1, tokens) for first, tokens in batch_spans(train)], step)


def batch_spans(train: TrainConfig) -> Iterator[tuple[int, int]]:
    """The first step and the tokens per step of every size of the batch, in the order of the steps."""
    yield 1, train.global_batch_tokens
    yield from ((change.from_step, change.global_batch_tokens) for change in train.batch_changes)
