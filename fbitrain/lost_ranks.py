"""Which rank was lost: said in one sentence, where the others would show Gloo's traceback or wait inside NCCL.

Every rank knows the others' processes and looks after those on its own machine. The first to miss one says so and
leaves LOST.json in the run folder, which all nodes share: the others see there that it has been said.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from fbitrain.base.errors import passing
from fbitrain.base.processes import machine, started

NOTE = "LOST.json"
LOOK_S = 2.0  # between two looks at the processes of this machine
PATIENCE_S = 10.0  # for a broken connection to be explained by a process that is gone, here or on another node
# What the errors of Gloo, NCCL and the rendezvous store say; torch raises most of them as plain RuntimeErrors.
_BROKEN = re.compile(
    r"gloo|nccl|Connection (closed|reset|refused)|Broken pipe|TCPStore|Timed out waiting", re.IGNORECASE
)


@dataclass(frozen=True)
class Process:
    """A rank's process: where it runs, and what tells it from a later process of the same number."""

    rank: int
    pid: int
    started: str  # as /proc gives it, in clock ticks since the machine started
    host: str
    machine: str  # the same for processes that see each other's numbers

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def _own_process() -> Process:
    return Process(dist.get_rank(), os.getpid(), started(os.getpid()), socket.gethostname(), machine())


class Peers:
    """The processes of all ranks, `processes`, by rank. Collective to make."""

    def __init__(self, run_dir: Path) -> None:
        self._note = run_dir / NOTE
        if dist.get_rank() == 0:  # what a launch before left says nothing of this one
            with suppress(OSError):
                self._note.unlink(missing_ok=True)
        self._mine = _own_process()
        found: list[Process] = [self._mine] * dist.get_world_size()
        dist.all_gather_object(found, self._mine)
        # A rank of an earlier launch may be late with its note.
        self.processes, self.rank = found, self._mine.rank
        self.launch = f"{found[0].host} {found[0].pid} {found[0].started}"
        self._here = [p for p in found if p.machine == self._mine.machine and p.started]
        self._elsewhere = [p for p in found if p.machine != self._mine.machine]

    def missing(self) -> list[Process]:
        """The ranks of this machine whose processes are gone."""
        return [process for process in self._here if started(process.pid) != process.started]

    def claim(self, missing: Sequence[Process]) -> bool:
        """Whether this rank is the one to say that these are missing: the first on any node."""
        content = {"ranks": [p.rank for p in missing], "seen_by": self._mine.rank, "launch": self.launch}
        try:
            if (before := self._noted()) and self.launch not in before:
                self._note.unlink(missing_ok=True)
            with self._note.open("x", encoding="utf-8") as note:
                note.write(json.dumps(content) + "\n")
        except FileExistsError:
            return False
        except OSError:  # better twice than not at all
            return True
        return True

    def said(self) -> bool:
        """Whether a rank of this launch has said which rank was lost."""
        return self.launch in self._noted()

    def _noted(self) -> str:
        """What LOST.json holds; empty where there is none, and while it is written."""
        try:
            return self._note.read_text(encoding="utf-8")
        except OSError:
            return ""

    def explain(self, error: Exception) -> NoReturn:
        """Raises the UserError that says why the talk between the ranks ended with `error`; waits for the reason."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not self.said():
            if (missing := self.missing()) and self.claim(missing):
                raise passing(sentence(missing)) from error
            time.sleep(0.1)
        if not self.said() and self.claim([]):
            raise passing(self._unexplained(error)) from error
        said = passing("another rank has said which rank was lost")
        said.said_elsewhere = True
        raise said from error

    def _unexplained(self, error: Exception) -> str:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if self._elsewhere:
            hosts = sorted({process.host for process in self._elsewhere})
            who = (
                f"all ranks of {self._mine.host} are there, so a rank of another node ({', '.join(hosts)}) was lost, "
                "which of them cannot be told from here, or the network between the nodes"
            )
        else:
            who = "all ranks are there, so one of them hangs, or took longer than engine.comm_timeout_s"
        return f"the ranks lost touch ({reason}): {who}; start the same command again to go on from the last checkpoint"


def sentence(missing: Sequence[Process]) -> str:
    """What to say of ranks that are gone."""
    names = " and ".join(map(str, missing))
    return (
        f"{names} ended in the middle of the run; its own last lines, or dmesg where it was killed for want of memory, "
        "say why; start the same command again to go on from the last checkpoint"
    )


@contextmanager
def lost_ranks_named(run_dir: Path) -> Iterator[Peers]:
    """While the ranks work together inside: says which of them was lost, if one is. Collective.

    Raises UserError where the connection to another rank broke. A rank that waits inside NCCL raises nothing, so a
    thread looks for lost ranks, too, and says which it was; the launcher ends the ranks that wait.
    """
    peers, over = Peers(run_dir), threading.Event()
    threading.Thread(target=_watch, args=(peers, over), daemon=True).start()
    try:
        yield peers
    except RuntimeError as error:
        over.set()
        if isinstance(error, dist.DistError) or _BROKEN.search(str(error)):
            peers.explain(error)
        raise
    finally:
        over.set()


def _watch(peers: Peers, over: threading.Event) -> None:
    while not over.wait(LOOK_S):
        if peers.missing() and not over.wait(LOOK_S):  # ranks that end together do not end at once
            if peers.claim(missing := peers.missing()):
                print(f"fbitrain: {sentence(missing)}", file=sys.stderr, flush=True)
            return
