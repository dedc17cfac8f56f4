"""What tells one process from another, also from a later one of the same number and from those of other machines; and
plain children of a rank. multiprocessing's would import the caller's main module, and with it torch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

IGNORED_SIGNALS = {signal.SIGINT, signal.SIGTERM}


def started(pid: int) -> str:
    """When the process `pid` started; empty if there is none, or only what its parent has not yet taken note of."""
    try:
        # The name, in parentheses, may hold anything; fields 3 (state) and 22 (start) of proc(5) come after it.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def machine() -> str:
    """The same for processes that see each other's numbers: of one host, since it was started, and one container."""
    namespace = ""
    with suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid") + Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{socket.gethostname()} {namespace}"


def start_child(
    command: str, arguments: Sequence[str], pass_fds: Sequence[int], stdin: int = subprocess.PIPE
) -> subprocess.Popen[bytes]:
    """Starts an interpreter that runs the Python text `command` and shares the descriptors `pass_fds`.

    Signals that a launcher sends to the process group, or to every descendant of a rank, leave the child alone: it
    inherits a mask. It is to end with its parent (`leave_with`).
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED_SIGNALS)
    try:
        return subprocess.Popen(
            [sys.executable, "-c", command, *arguments],
            stdin=stdin,
            pass_fds=pass_fds,
            # The parent's own search path, and not the folder it happens to run in.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_with(parent: int) -> None:
    """Ends this process when its parent is gone, however it went and whoever else holds its pipes; for a thread."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def how_it_ended(child: subprocess.Popen[bytes]) -> str:
    """Why a child is gone that was not told to go, to be put behind its name in a sentence."""
    code = child.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
    why = " (was the machine out of memory?)" if code == -signal.SIGKILL else " (its own message is above)"
    return how + why
