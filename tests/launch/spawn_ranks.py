"""Starts N ranks of a script as DeepSpeed's launcher does, without its two extra interpreters that each import torch.

`spawn_ranks.py N PORT SCRIPT [ARGUMENT ...]`; the first rank to fail ends the others, and its exit code is ours. With
AS_SRUN in the environment the ranks are told what srun would tell them, and nothing else.
"""

from __future__ import annotations

import os
import subprocess
import sys


def main(n_ranks: int, port: str, command: list[str]) -> int:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-u", *command],
            env={**os.environ, **(of_srun if "AS_SRUN" in os.environ else of_deepspeed)(rank, n_ranks, port)},
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


def of_deepspeed(rank: int, n_ranks: int, port: str) -> dict[str, str]:
    return {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(n_ranks)},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(n_ranks)},
    }


def of_srun(rank: int, n_ranks: int, port: str) -> dict[str, str]:
    return {
        **{"SLURM_JOB_ID": port, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost,elsewhere[1-3]"},
        **{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(n_ranks)},
        **{"SLURM_STEP_TASKS_PER_NODE": str(n_ranks), "SLURM_NODEID": "0", "SLURM_CPUS_PER_TASK": "1"},
    }


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
