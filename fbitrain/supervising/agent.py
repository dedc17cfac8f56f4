"""What a supervisor starts on each node: it starts the node's ranks, and sees to it that none outlives the attempt.

It talks in lines of JSON, over standard input and output, through whatever joins it to the supervisor: a pipe, ssh or
srun. The ranks end when the supervisor says so, when it is gone, and when it has not been heard for the time of a
lease: so nothing is left on a node that is cut off when the supervisor starts anew without it. No package but Python's.

    to the agent     {"start": {"command", "cwd", "environ", "ranks": [{name: value}], "lease_s"}}
                     {"beat": n}   {"signal": number}   {"end": true}
    from the agent   {"hello": host, "port": a free port}   {"beat": n}
                     {"exit": i, "code": code, "error": …, "restart_mends": …, "echo": …}   {"gone": true}
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ERROR_FILE = "FBITRAIN_ERROR_FILE"  # base/errors.py writes it
LOOK_S = 0.1  # between two looks at the ranks
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_LEFT_ALONE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # a scheduler's signals are for the ranks


class Ranks:
    """The ranks of this node, each in a session of its own, and the notes that they leave of their errors."""

    def __init__(self, start: Mapping[str, Any]) -> None:
        self._notes = Path(tempfile.mkdtemp(prefix="fbitrain-"))
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        for i, environ in enumerate(start["ranks"]):
            self._running[i] = subprocess.Popen(
                start["command"],
                cwd=start["cwd"],
                env={**os.environ, **start["environ"], **environ, ERROR_FILE: str(self._notes / str(i))},
                stdin=subprocess.DEVNULL,
                stdout=2,  # our standard output is the supervisor's
                start_new_session=True,
                preexec_fn=_as_rank,
            )

    def ended(self) -> list[dict[str, Any]]:
        """The ranks that ended since the last call; nothing that they started is left."""
        found = []
        for i, process in list(self._running.items()):
            if process.poll() is not None:
                del self._running[i]
                _signal_group(process.pid, signal.SIGKILL)
                note: dict[str, Any] = {}
                with suppress(OSError, ValueError):
                    note = json.loads((self._notes / str(i)).read_text(encoding="utf-8"))
                found.append({"exit": i, "code": process.returncode, **note})
        return found

    def signal(self, number: int) -> None:
        """To all ranks at once, and not to their tokenizer processes, which leave with them."""
        for process in self._running.values():
            with suppress(ProcessLookupError):
                process.send_signal(number)

    def end(self) -> None:
        for process in self._running.values():
            _signal_group(process.pid, signal.SIGKILL)
        for process in self._running.values():
            process.wait()
        self._running = {}
        shutil.rmtree(self._notes, ignore_errors=True)


class Agent:
    """One attempt on one node: `run` returns when no rank is left and the supervisor is gone or has said the end."""

    def __init__(self) -> None:
        self._ranks: Ranks | None = None
        self._lease_s = float("inf")
        self._heard_at = time.monotonic()

    def run(self) -> None:
        pending = b""
        self._send({"hello": socket.gethostname(), "port": free_port()})
        try:
            while time.monotonic() < self._heard_at + self._lease_s:
                if select.select([0], [], [], LOOK_S)[0]:
                    read = os.read(0, 65536)
                    if not read:
                        break
                    *lines, pending = (pending + read).split(b"\n")
                    self._heard_at = time.monotonic()
                    if not all(self._obey(json.loads(line)) for line in lines):
                        break
                for end in self._ranks.ended() if self._ranks else ():
                    self._send(end)
        except BrokenPipeError:  # the supervisor is gone
            return
        finally:
            if self._ranks:
                self._ranks.end()
        with suppress(BrokenPipeError):
            self._send({"gone": True})

    def _obey(self, order: Mapping[str, Any]) -> bool:
        """False for the order to end."""
        if "start" in order:
            self._lease_s = order["start"]["lease_s"]
            try:
                self._ranks = Ranks(order["start"])
            except OSError as error:
                self._send({"exit": 0, "code": 1, "error": f"the ranks cannot be started: {error}"})
        elif "signal" in order and self._ranks:
            self._ranks.signal(order["signal"])
        elif "beat" in order:
            self._send({"beat": order["beat"]})
        return "end" not in order

    @staticmethod
    def _send(message: Mapping[str, Any]) -> None:
        os.write(1, json.dumps(message).encode() + b"\n")


def free_port() -> int:
    """A port that nobody on this node listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _as_rank() -> None:
    """In a new rank, before it is one: it hears signals again, and dies with this agent, however that ends."""
    for number in _LEFT_ALONE:
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def main() -> None:
    for number in _LEFT_ALONE:
        signal.signal(number, signal.SIG_IGN)
    Agent().run()


if __name__ == "__main__":
    main()
