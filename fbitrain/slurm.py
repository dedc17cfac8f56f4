"""What SLURM tells a rank that `srun` started: its number, where the ranks meet, its cores, the job's end. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")


def adopt_ranks(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE and MASTER_… where no launcher did and `srun` started this process.

    A process that srun starts alone is left as it is: it may be a shell, in which several runs are started.
    """
    if "RANK" in environ or not _of_several(environ) or "SLURM_PROCID" not in environ:
        return
    local_rank = environ.get("SLURM_LOCALID", "0")
    if environ.get("CUDA_VISIBLE_DEVICES", "").isdigit():  # --gpus-per-task: the one GPU that is seen is number 0
        local_rank = "0"
    job, step = (int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": local_rank,
        "LOCAL_SIZE": str(_tasks_here(environ)),
        "MASTER_ADDR": first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "127.0.0.1")),
        # Jobs and steps that share a node get different ports.
        "MASTER_PORT": str(20000 + (7 * job + step) % 20000),
    }
    for name, value in found.items():
        environ.setdefault(name, value)


def first_host(nodes: str) -> str:
    """The first name of a list as SLURM writes it: `node[007-009,12],other` -> `node007`."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else nodes)


def cores_of_rank(environ: MutableMapping[str, str] = os.environ) -> int | None:
    """The cores that SLURM gives each of several tasks; None elsewhere, or where --cpus-per-task was not said."""
    cores = environ.get("SLURM_CPUS_PER_TASK", "") if _of_several(environ) else ""
    return int(cores) if cores.isdigit() and int(cores) else None


def job_end(environ: MutableMapping[str, str] = os.environ) -> float | None:
    """When the job's time is over, in seconds since 1970; None where nobody says."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    return float(end) if end.isdigit() else None


def _of_several(environ: MutableMapping[str, str]) -> bool:
    """Whether this is one of several tasks. The variable is srun's: a batch script has all the others, too."""
    return environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _tasks_here(environ: MutableMapping[str, str]) -> int:
    """Of this node, from a list such as `8(x3),4` of all nodes."""
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or "1"
    nodes = [int(tasks) for tasks, times in _COUNT.findall(counts) for _ in range(int(times or 1))]
    node = int(environ.get("SLURM_NODEID", "0"))
    return nodes[node] if node < len(nodes) else 1
