"""The slowest and the fastest rank of an interval, and what their steps spend their time on.

Ranks work in step, so their steps take equally long; the slow rank is the one that spends least of it waiting.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from torch import Tensor

from fbitrain.step_clock import ACTIVITIES

STRAGGLES = 0.2  # of the median rank's work that the slowest rank has more


def rank_scalars(seconds: Tensor) -> dict[str, float]:
    """slowest_rank/… and fastest_rank/… of `seconds`, [ranks, len(ACTIVITIES)], each of one step."""
    table = [dict(zip(ACTIVITIES, row, strict=True)) for row in seconds.tolist()]
    working = [sum(row.values()) - row["waiting"] for row in table]
    median = statistics.median_low(working)  # of two ranks the fast one
    scalars: dict[str, float] = {}
    for which, rank in (
        ("slowest_rank", max(range(len(table)), key=working.__getitem__)),
        ("fastest_rank", min(range(len(table)), key=working.__getitem__)),
    ):
        scalars |= {f"{which}/number": float(rank), f"{which}/working_s": working[rank]}
        scalars |= {f"{which}/{name}_s": value for name, value in table[rank].items()}
    scalars["slowest_rank/above_median"] = max(working) / median - 1 if median else 0.0
    return scalars


def straggler(scalars: Mapping[str, float], hosts: Sequence[str]) -> str:
    """What a log line says of the slowest rank; empty where it is not much slower than the others."""
    above = scalars["slowest_rank/above_median"]
    if above <= STRAGGLES:
        return ""
    rank = int(scalars["slowest_rank/number"])
    most = max((name for name in ACTIVITIES if name != "waiting"), key=lambda name: _excess(scalars, name))
    return (
        f"rank {rank} on {hosts[rank]} works {above:.0%} longer than the median rank: "
        f"{scalars['slowest_rank/working_s']:.2f} s a step, most of the difference in {most}"
    )


def _excess(scalars: Mapping[str, float], name: str) -> float:
    return scalars[f"slowest_rank/{name}_s"] - scalars[f"fastest_rank/{name}_s"]
