"""What is said when nothing moves any more: which rank hangs, and where each of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbitrain.base.processes import machine
from fbitrain.lost_ranks import Process
from fbitrain.step_clock import Position


@dataclass(frozen=True)
class Report:
    """Where a rank is, and at which line of ours."""

    rank: int
    position: Position
    frame: str = ""

    def __str__(self) -> str:
        return f"{self.position}" + (f", at {self.frame}" if self.frame else "")

    def to_json(self) -> list[Any]:
        return [self.rank, [*self.position], self.frame]

    @classmethod
    def of_json(cls, told: Sequence[Any]) -> Report:
        rank, position, frame = told
        return cls(rank, Position(*position), frame)


def culprits(reports: Mapping[int, Report], n_ranks: int) -> list[int]:
    """The ranks that the others wait for: those without a report, or else those that entered fewest collectives.

    Empty where all have entered the same collective and wait in it.
    """
    if silent := [rank for rank in range(n_ranks) if rank not in reports]:
        return silent
    entered = {rank: report.position.collective for rank, report in reports.items()}
    least = min(entered.values())
    if least == max(entered.values()) and any(report.position.inside for report in reports.values()):
        return []
    return sorted(rank for rank, n in entered.items() if n == least)


def report_text(
    reports: Mapping[int, Report],
    last_seen: Mapping[int, Report],
    processes: Sequence[Process],
    stacks: Path,
    limit_s: float,
) -> str:
    """Who hangs, in one sentence, and where every rank is, in a second line.

    reports: of the ranks that answered; last_seen: what a rank told before, in the ordinary course.
    """
    late = [processes[rank] for rank in culprits(reports, len(processes))]
    if not late:
        who = "all ranks have entered the same collective, so a device hangs, or the network between the ranks"
    elif late[0].rank not in reports:
        states = [state for process in late if (state := state_of(process))]
        why = f"state of the process: {', '.join(states)}" if states else "lost, cut off or stopped"
        who = f"{_names(late)} {'does' if len(late) == 1 else 'do'} not answer ({why})"
    else:
        who = f"{_names(late)} {'hangs' if len(late) == 1 else 'hang'}"
    if 0 < len(late) < len(processes):
        who += ", and the other ranks wait"
    positions = dict.fromkeys(range(len(processes)), "never seen")
    positions |= {rank: f"last seen {seen}" for rank, seen in last_seen.items()}
    positions |= {rank: str(report) for rank, report in reports.items()}
    return (
        f"fbitrain: nothing has moved for {limit_s:.0f} s: {who}; {stacks} has the stacks of all ranks that answer; "
        f"start the same command again to go on from the last checkpoint\n"
        f"fbitrain: where the ranks are: {_grouped(positions)}"
    )


def _names(processes: Sequence[Process]) -> str:
    more = f" and {len(processes) - 4} more" if len(processes) > 4 else ""
    return " and ".join(str(process) for process in processes[:4]) + more


def _grouped(positions: Mapping[int, str]) -> str:
    """Ranks at one place together, as there may be a thousand."""
    groups: dict[str, list[int]] = {}
    for rank in sorted(positions):
        groups.setdefault(positions[rank], []).append(rank)
    return "; ".join(f"rank{'s' if len(ranks) > 1 else ''} {_ranges(ranks)}: {at}" for at, ranks in groups.items())


def _ranges(ranks: Sequence[int]) -> str:
    """[0, 2, 3, 4] -> "0, 2-4"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def state_of(process: Process) -> str:
    """Such as "T (stopped)" or "D (disk sleep)"; empty if the process is gone, or on another machine."""
    if process.machine != machine():
        return ""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("State:")), "")
