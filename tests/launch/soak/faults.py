"""The kinds of faults: each does its harm, waits until the run has passed the step at which it came, and is mended."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fbitrain.checkpoint_folders import step_folder
from fbitrain.supervising.supervisor import newest_step
from tests.launch.soak.network import NetworkNode
from tests.launch.soak.run import SoakRun


@dataclass(frozen=True)
class Result:
    """Of one fault: what it cost."""

    kind: str
    seconds: float  # from the fault until the step at which it came was passed again
    steps: int  # that were done again
    ranks: int  # afterwards


@dataclass
class Scene:
    """A run and the machines that it is on."""

    run: SoakRun
    nodes: list[NetworkNode]
    disk: Path  # where the run folder is; small
    rng: random.Random

    def rank(self, number: int | None = None) -> int:
        """The process of a rank; any, where no number is given."""
        found = sorted(pid for pid, rank in self.run.ranks().items() if number in (None, rank))
        return self.rng.choice(found)

    def node(self) -> NetworkNode:
        """One that has a rank."""
        ranks = self.run.ranks()
        return self.rng.choice([node for node in self.nodes if any(node.has(pid) for pid in ranks)])

    def await_failure(self, n_before: int) -> None:
        """Until the supervisor has said that the attempt failed; then none of its ranks is left."""
        self.run.wait_for(lambda: len(self.run.failures()) > n_before, "the attempt fails")
        self.run.step()

    def await_step(self, step: int) -> None:
        self.run.wait_for(
            lambda: self.run.step() > step or self.run.process.poll() is not None, f"step {step} is passed"
        )
        assert self.run.process.poll() is None, f"the run ended\n{self.run.output[-3000:]}"


def signalled(number: signal.Signals, rank: int | None = None) -> Callable[[Scene], Callable[[], None]]:
    def harm(scene: Scene) -> Callable[[], None]:
        os.kill(scene.rank(rank), number)
        return lambda: None

    return harm


def agent_killed(scene: Scene) -> Callable[[], None]:
    """The parent of a rank, which looks after it."""
    rank = scene.rank()
    fields = Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()
    os.kill(int(fields[1]), signal.SIGKILL)
    return lambda: None


def node_cut_off(scene: Scene) -> Callable[[], None]:
    node = scene.node()
    node.cut_off()
    return node.come_back


def node_lost(scene: Scene) -> Callable[[], None]:
    node = scene.node()
    node.lose()
    return node.start


def disk_full(scene: Scene) -> Callable[[], None]:
    filler = scene.disk / "filler"
    n_before = len(scene.run.failures())
    with suppress(OSError), filler.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(1 << 16))
    scene.run.wait_for(lambda: len(scene.run.failures()) > n_before, "a checkpoint does not fit")
    filler.unlink()
    return lambda: None


def checkpoint_damaged(scene: Scene) -> Callable[[], None]:
    """One byte of the newest checkpoint is another, and a rank dies."""
    os.kill(scene.rank(0), signal.SIGKILL)  # first: it would write a newer one
    shard = step_folder(scene.run.run_dir, newest_step(scene.run.run_dir)) / "shard_rank00000.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-5] ^= 1
    shard.write_bytes(damaged)
    return lambda: None


# Kinds that end the attempt; what each returns mends it, once the run has come back without that.
ENDING: dict[str, Callable[[Scene], Callable[[], None]]] = {
    "rank killed": signalled(signal.SIGKILL),
    "rank 0 killed": signalled(signal.SIGKILL, 0),
    "rank stopped (SIGSTOP)": signalled(signal.SIGSTOP),
    "agent of a node killed": agent_killed,
    "node cut off, later returned": node_cut_off,
    "node lost whole, later returned": node_lost,
    "disk full at a checkpoint": disk_full,
    "rank killed, newest checkpoint damaged": checkpoint_damaged,
}


def node_slowed(scene: Scene) -> None:
    node = scene.node()
    node.slow_down("4mbit")
    time.sleep(8)
    node.speed_up()


def disk_slow(scene: Scene) -> None:
    """Every fsync takes a second, until another checkpoint is written."""
    scene.run.slow_disk.touch()
    before = newest_step(scene.run.run_dir)
    scene.run.wait_for(lambda: newest_step(scene.run.run_dir) > before, "a checkpoint on a slow disk")
    scene.run.slow_disk.unlink()


# Kinds that the run is to live through.
BORNE: dict[str, Callable[[Scene], None]] = {"node slowed to 4 Mbit/s": node_slowed, "slow disk (fsync 1 s)": disk_slow}

# Kinds that end the supervisor: a queue starts the same command again.
OF_SUPERVISOR = {"supervisor stopped (SIGTERM)": signal.SIGTERM, "supervisor killed": signal.SIGKILL}


def inflict(kind: str, scene: Scene) -> Result:
    """Does the harm, and returns when the run has recovered from it and it is mended."""
    run = scene.run
    at, began, attempt = run.step(), time.monotonic(), len(run.lines_before)
    mend: Callable[[], None] = lambda: None  # noqa: E731
    if kind in BORNE:
        n_failures = len(run.failures())
        BORNE[kind](scene)
        scene.await_step(at)
        assert len(run.failures()) == n_failures, f"{kind} ended the attempt: {run.failures()[-1]}"
        return Result(kind, 0.0, 0, len(run.ranks()))
    if kind in OF_SUPERVISOR:
        run.process.send_signal(OF_SUPERVISOR[kind])
        run.process.wait(120)
        run.wait_for(lambda: not run.ranks(), "no rank is left")
        run.note_attempt()
        run.start()
    else:
        n_failures = len(run.failures())
        mend = ENDING[kind](scene)
        scene.await_failure(n_failures)
    at = max(run.attempts()[attempt], default=at)  # it may have gone on for a moment
    scene.await_step(at)
    seconds = time.monotonic() - began
    again = sorted(run.attempts()[-1])
    mend()
    ranks = run.ranks()
    assert len(set(ranks.values())) == len(ranks) == max(ranks.values()) + 1, f"orphans: {ranks}"
    return Result(kind, seconds, max(0, at - again[0] + 1), len(ranks))
