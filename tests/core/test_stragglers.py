"""The slowest and the fastest rank of an interval."""

from __future__ import annotations

import pytest
import torch

from fbitrain.step_clock import ACTIVITIES
from fbitrain.stragglers import rank_scalars, straggler


def table(*works: float) -> torch.Tensor:
    """One row per rank: 1 s of each kind of work but `works` of backward; waiting fills a step of 20 s up."""
    rows = [[1.0, 1.0, 1.0, work, 1.0, 16.0 - work] for work in works]
    assert len(rows[0]) == len(ACTIVITIES)
    return torch.tensor(rows, dtype=torch.float64)


def test_the_slow_rank_is_the_one_that_waits_least() -> None:
    scalars = rank_scalars(table(2.0, 5.0, 1.0, 2.0))
    assert (scalars["slowest_rank/number"], scalars["fastest_rank/number"]) == (1, 2)
    assert (scalars["slowest_rank/working_s"], scalars["fastest_rank/working_s"]) == (9, 5)
    assert (scalars["slowest_rank/backward_s"], scalars["slowest_rank/waiting_s"]) == (5, 11)
    assert scalars["slowest_rank/above_median"] == 0.5
    assert straggler(scalars, ["a", "b", "c", "d"]) == (
        "rank 1 on b works 50% longer than the median rank: 9.00 s a step, most of the difference in backward"
    )


def test_of_two_ranks_the_fast_one_is_what_the_other_is_compared_with() -> None:
    assert rank_scalars(table(1.0, 2.5))["slowest_rank/above_median"] == pytest.approx(0.3)


def test_ranks_that_differ_little_are_not_named() -> None:
    assert straggler(rank_scalars(table(1.0, 1.2, 1.9)), ["a", "b", "c"]) == ""
    assert straggler(rank_scalars(torch.zeros(2, len(ACTIVITIES))), ["a", "b"]) == ""
