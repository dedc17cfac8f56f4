"""Starts N ranks of a script as DeepSpeed's launcher does, without its two extra interpreters that each import torch.

`spawn_ranks.py N PORT SCRIPT [ARGUMENT ...]`; the first rank to fail ends the others, and its exit code is ours.
"""

from __future__ import annotations

import os
import subprocess
import sys


def main(n_ranks: int, port: str, command: list[str]) -> int:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-u", *command],
            env={
                **os.environ,
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n_ranks)},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(n_ranks)},
            },
        )
        for rank in range(n_ranks)
    ]
    waiting = {process.pid: process for process in ranks}
    while waiting:
        pid, status = os.wait()
        if pid not in waiting:
            continue
        process = waiting.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            for other in waiting.values():
                other.kill()
                other.wait()
            return abs(process.returncode)
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
