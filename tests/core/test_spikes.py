"""Which steps are spikes, by numbers alone."""

from __future__ import annotations

import math

import pytest

from fbitrain.config import TrainConfig
from fbitrain.spikes import (
    MOST_IN_A_ROW,
    RunningMeans,
    SpikeError,
    fault_of_gradient,
    fault_of_loss,
    require_progress,
)


def test_the_mean_is_plain_at_first_and_forgets_later() -> None:
    means = RunningMeans()
    for loss in (4.0, 2.0):
        means = means.after(loss, 2 * loss, window=2)
    assert (means.loss, means.grad_norm, means.n_steps) == (3.0, 6.0, 2)
    assert means.after(5.0, 6.0, window=2).loss == 4.0


def test_a_spike_is_far_above_the_mean_of_enough_steps() -> None:
    train = TrainConfig(spike_loss=0.5, spike_grad_norm=3, spike_window=10)
    means = RunningMeans(loss=2.0, grad_norm=1.0, n_steps=10)
    assert fault_of_loss(train, means, 2.5) == fault_of_gradient(train, means, 3.0) == ""
    assert "more than train.spike_loss=0.5 above its running mean 2" in fault_of_loss(train, means, 2.6)
    assert "more than train.spike_grad_norm=3 times its running mean 1" in fault_of_gradient(train, means, 3.1)
    early = RunningMeans(loss=2.0, grad_norm=1.0, n_steps=9)
    assert fault_of_loss(train, early, 9.0) == fault_of_gradient(train, early, 9.0) == ""


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_a_fault_at_once(number: float) -> None:
    assert fault_of_loss(TrainConfig(), RunningMeans(), number) == "is not finite"
    assert fault_of_gradient(TrainConfig(), RunningMeans(), number) == "is not finite"
    assert fault_of_loss(TrainConfig(), RunningMeans(2.0, 1.0, 1000), 1e6) == "", "no threshold was set"


def test_a_run_in_which_every_step_is_a_spike_ends() -> None:
    require_progress(RunningMeans(left_out=MOST_IN_A_ROW - 1), "fault")
    with pytest.raises(SpikeError, match="and so were the 10 steps before it"):
        require_progress(RunningMeans(left_out=MOST_IN_A_ROW), "fault")
