"""Attempts until the run is finished: restarted from its newest checkpoint, given up where that is of no use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fbitrain import slurm
from fbitrain.base.optional_writes import JsonLines
from fbitrain.supervising.attempt import End, StopRequest

LOG = "attempts.jsonl"  # in the run folder
MOST_BACKOFF_S = 300.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
GAVE_UP = 1


@dataclass(frozen=True)
class Rules:
    """When to start again and when not to."""

    restarts: int = 3  # in a row without a new checkpoint
    backoff_s: float = 5.0  # before the first restart; twice as long before each that follows without progress
    margin_s: float = 300.0  # no attempt begins this long before the end of a job's time


def newest_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint; -1 where there is none. Its contents are the ranks' to look at."""
    found = [path.parent.name for path in run_dir.glob("checkpoints/step_????????/COMPLETE.json")]
    return max((int(name.removeprefix("step_")) for name in found if name[5:].isdigit()), default=-1)


@dataclass
class Supervisor:
    """`run` returns the exit code: 0 for a run that is finished or was stopped as asked."""

    run_dir: Path
    attempt: Callable[[int], End]  # with its number, from 1
    rules: Rules
    stop: StopRequest
    say: Callable[[str], None]
    sleep: Callable[[float], None] = time.sleep

    def run(self) -> int:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        log = JsonLines(self.run_dir / LOG)
        best, in_vain, number = newest_step(self.run_dir), 0, 0
        while True:
            number += 1
            if self._out_of_time():
                return self._stopped("the end of the job's time", requeue=True)
            before, began = newest_step(self.run_dir), time.time()
            end = self.attempt(number)
            step = newest_step(self.run_dir)
            progress = step > best
            best, in_vain = max(best, step), 0 if progress else in_vain + 1
            log.add(_record(number, began, end, max(before, 0), max(step, 0)))
            if end.kind != "failed":
                return self._ended(end)
            self.say(f"attempt {number} failed at step {max(step, 0)} on {end.ranks} ranks: {end.reason}")
            if why := self._useless(end, progress, in_vain):
                self.say(f"gives up: {why}")
                return GAVE_UP
            self._back_off(in_vain)
            if self.stop.times:
                return self._stopped("a signal between two attempts", requeue=self._out_of_time())

    def _useless(self, end: End, progress: bool, in_vain: int) -> str:
        """Why another attempt would be of no use; empty if it may be."""
        if end.restart_mends is False or (end.restart_mends is None and not progress):
            return "a restart cannot mend that"
        if in_vain > self.rules.restarts:
            return f"{in_vain} attempts in a row wrote no new checkpoint (--restarts {self.rules.restarts})"
        return ""

    def _back_off(self, in_vain: int) -> None:
        wait = min(MOST_BACKOFF_S, self.rules.backoff_s * 2 ** max(0, in_vain - 1))
        self.say(f"starts again in {wait:g} s")
        until = time.monotonic() + wait
        while not self.stop.times and (left := until - time.monotonic()) > 0:
            self.sleep(min(left, 0.5))

    def _ended(self, end: End) -> int:
        """All ranks ended well, or as they were asked to."""
        if end.kind == "ended" and (self.run_dir / "FINISHED.json").is_file():
            self.say("finished")
            return 0
        reason = _reason_of_stop(self.run_dir) or end.reason or "a signal"
        return self._stopped(reason, requeue=self._out_of_time())

    def _stopped(self, reason: str, requeue: bool) -> int:
        """Under SLURM a job whose time is over goes back into the queue; one that was told to stop does not."""
        job = os.environ.get("SLURM_JOB_ID")
        if not (requeue and job):
            self.say(f"stopped by {reason}; the same command goes on from the newest checkpoint")
            return 0
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if asked.returncode:
            self.say(f"`scontrol requeue {job}` failed ({asked.stderr.strip()}); submit the job again to go on")
            return GAVE_UP
        self.say(f"stopped by {reason}; job {job} is in the queue again")
        return 0

    def _out_of_time(self) -> bool:
        """Whether so little is left of the job's time that its ranks would stop at once."""
        end = slurm.job_end()
        return end is not None and time.time() > end - self.rules.margin_s


def _reason_of_stop(run_dir: Path) -> str:
    try:
        return str(json.loads((run_dir / "STOPPED.json").read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return ""


def _record(number: int, began: float, end: End, before: int, step: int) -> dict[str, Any]:
    return {
        "attempt": number,
        "began": datetime.fromtimestamp(began, timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.time() - began, 1),
        "ranks": end.ranks,
        "nodes": list(end.nodes),
        "left_out": list(end.left_out),
        "from_step": before,
        "step": step,
        "end": end.kind,
        "reason": end.reason,
    }
