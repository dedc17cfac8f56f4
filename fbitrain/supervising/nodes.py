"""Which nodes a run may have, how many ranks each takes, and the command that starts an agent there."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fbitrain.base.errors import UserError
from fbitrain.supervising.agent import free_port as free_port

COMMAND = "from fbitrain.supervising.agent import main; main()"
LOCAL = "localhost"
# Of the supervisor's environment, what the ranks of other nodes need, too; srun hands on all of it.
HANDED_ON = (
    *("NCCL_", "GLOO_", "TORCH", "PYTORCH_", "CUDA_", "OMP_", "MKL_", "UCX_", "FI_", "HF_", "TRANSFORMERS_"),
    *("FBITRAIN_", "DS_", "PYTHON", "LD_LIBRARY_PATH", "LOCAL_SIZE", "TOKENIZERS_"),
)


@dataclass(frozen=True)
class Node:
    """A machine that may run ranks."""

    name: str  # by which ssh, srun and the other nodes reach it
    slots: int  # ranks that it takes


@dataclass(frozen=True)
class Reach:
    """How an agent is started on a node: `prefix` with NODE in place of its name; empty for this machine alone.

    through_shell: what follows the prefix is one word for a shell there, as ssh wants it.
    """

    prefix: tuple[str, ...] = ()
    through_shell: bool = False

    def command(self, node: Node) -> list[str]:
        """The agent's command line; its working folder is ours."""
        agent = [sys.executable, "-c", COMMAND]
        prefix = [word.replace("NODE", node.name) for word in self.prefix]
        if not prefix or node.name in (LOCAL, socket.gethostname()):
            return agent
        if not self.through_shell:
            return [*prefix, *agent]
        path = os.pathsep.join(filter(None, sys.path))
        return [*prefix, f"exec env PYTHONPATH={shlex.quote(path)} PYTHONSAFEPATH=1 {shlex.join(agent)}"]


def of_ssh(command: str) -> Reach:
    """By ssh, or whatever takes its place: `command HOST LINE`."""
    return Reach((*shlex.split(command), "NODE"), through_shell=True)


def of_srun(environ: Mapping[str, str] = os.environ) -> Reach:
    """A step of this job on one node, with all that the job has there, beside a step that may be going away."""
    words = ["srun", "--nodes=1", "--ntasks=1", "--nodelist=NODE", "--overlap", "--cpu-bind=none", "--mem=0"]
    words += [f"--cpus-per-task={cores}"] if (cores := environ.get("SLURM_CPUS_ON_NODE")) else []
    words += [f"--gpus-per-node={gpus}"] if (gpus := environ.get("SLURM_GPUS_ON_NODE")) else []
    return Reach((*words, "--unbuffered", "--export=ALL"))


def of_hostfile(path: Path) -> list[Node]:
    """The nodes of a file as DeepSpeed reads it: `name slots=8` in each line. Raises UserError where it is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the hostfile {path} cannot be read: {error}") from None
    nodes = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdigit() or not int(slots):
            raise UserError(f"line {number} of the hostfile {path} is not `NAME slots=NUMBER`: {line.strip()!r}")
        nodes.append(Node(words[0], int(slots)))
    if not nodes:
        raise UserError(f"the hostfile {path} names no node; give each a line `NAME slots=NUMBER`")
    return nodes


def of_slurm(environ: Mapping[str, str] = os.environ) -> list[Node]:
    """The nodes of this job. Raises UserError if SLURM does not name them."""
    command = ["scontrol", "show", "hostnames", environ["SLURM_JOB_NODELIST"]]
    try:
        names = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"the job's nodes are not known: `{shlex.join(command)}` failed ({error})") from None
    tasks = environ.get("SLURM_NTASKS_PER_NODE") or environ.get("SLURM_GPUS_ON_NODE") or "1"
    return [Node(name, int(tasks.partition("(")[0])) for name in names]


def of_this_machine(n_ranks: int | None) -> list[Node]:
    """This machine alone, with a rank on each of its GPUs, or on its cores."""
    if n_ranks is None:
        count = "import torch; print(torch.cuda.device_count())"
        found = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=False).stdout
        n_ranks = int(found) if found.strip().isdigit() else 0
    return [Node(LOCAL, max(1, n_ranks))]


def handed_on(environ: Mapping[str, str], names: Sequence[str] = HANDED_ON) -> dict[str, str]:
    """Of `environ`, the variables whose names begin with one of `names`."""
    return {name: value for name, value in environ.items() if name.startswith(tuple(names))}
