"""What tells one process from another, also from a later one of the same number and from those of other machines."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path


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
