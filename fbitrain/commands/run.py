"""Train until the run is finished, restarted after a lost rank or node: `fbitrain run -- pretrain CONFIG.yaml …`."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

import fbitrain
from fbitrain.base.command import natural, positive
from fbitrain.base.errors import UserError
from fbitrain.config import Config, load_config
from fbitrain.supervising.attempt import Attempt, End, Patience, StopRequest
from fbitrain.supervising.nodes import Node, Reach, of_hostfile, of_slurm, of_srun, of_ssh, of_this_machine
from fbitrain.supervising.supervisor import SIGNALS, Rules, Supervisor

VERBS = ("pretrain", "finetune")
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10"


def main(arguments: argparse.Namespace) -> int:
    verb, *words = arguments.command
    config_name, *overrides = [word for word in words if not word.startswith("-")] or [""]
    if verb not in VERBS:
        raise UserError(f"fbitrain run starts {' or '.join(VERBS)}, not {verb!r}")
    nodes, reach = places(arguments)
    config = load_config(config_name, overrides, world_size=sum(node.slots for node in nodes))
    stop = StopRequest()
    for number in SIGNALS:
        signal.signal(number, stop.note)
    rules = Rules(arguments.restarts, arguments.backoff, config.checkpoint.margin_s)
    patience = Patience(arguments.connect, arguments.silence, arguments.grace)

    def attempt(number: int) -> End:
        command = rank_command(verb, words, config, number)
        return Attempt(nodes, reach, command, patience, stop, arguments.min_ranks, say).run()

    say(f"{', '.join(f'{node.name} ({node.slots})' for node in nodes)}: {shlex.join(arguments.command)}")
    return Supervisor(config.run_dir, attempt, rules, stop, say).run()


def places(arguments: argparse.Namespace) -> tuple[list[Node], Reach]:
    """The nodes and how they are reached: those of a hostfile, of the SLURM job that this is in, or this machine."""
    if arguments.hostfile:
        if arguments.ranks:
            raise UserError("--ranks is for one machine; the slots in --hostfile say how many ranks each node has")
        return of_hostfile(arguments.hostfile), of_ssh(arguments.ssh)
    if "SLURM_JOB_NODELIST" in os.environ and "SLURM_STEP_ID" not in os.environ and not arguments.ranks:
        return of_slurm(), of_srun()
    return of_this_machine(arguments.ranks), Reach()


def rank_command(verb: str, words: list[str], config: Config, number: int) -> list[str]:
    """The command line of one rank in the `number`-th attempt: the script that DeepSpeed's launcher would start."""
    script = Path(fbitrain.__file__).parent / "launch" / f"{verb}.py"
    again = ["train.resume=auto"] if config.train.resume == "never" and number > 1 else []
    return [sys.executable, "-u", str(script), *words, *again]


def say(text: str) -> None:
    print(f"fbitrain run: {text}", flush=True)


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain run", description=__doc__)
    commands.add_argument("command", nargs="+", metavar="-- VERB CONFIG …", help="pretrain or finetune, with arguments")
    commands.add_argument("--restarts", type=natural, default=3, metavar="N", help="in a row without a new checkpoint")
    commands.add_argument("--ranks", type=positive, metavar="N", help="on this machine; default: one for each GPU")
    commands.add_argument("--hostfile", type=Path, help="nodes as `NAME slots=N`, reached by ssh")
    commands.add_argument("--ssh", default=SSH, metavar="COMMAND", help=f"how nodes are reached (default: {SSH})")
    commands.add_argument("--min-ranks", type=positive, default=1, metavar="N", help="with fewer it does not start")
    for name, default, what in (
        ("backoff", 5.0, "before the first restart; twice as long before each that follows without progress"),
        ("connect", 60.0, "for a node to answer; one that does not is left out of the attempt"),
        ("silence", 30.0, "after which a node of which nothing is heard is lost"),
        ("grace", 600.0, "for the ranks to save after a stop signal"),
    ):
        commands.add_argument(
            f"--{name}", type=float, default=default, metavar="S", help=f"seconds {what} ({default:g})"
        )
    return commands
