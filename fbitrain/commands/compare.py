"""Run a study and say what came of it: `compare.py launch/studies/NAME.yaml [--only TEXT …] [--table]`.

Each variant is a run of `fbitrain pretrain`, or `fbitrain finetune` where it starts from a pretrained model, in
runs/studies/NAME; finished ones are kept. The table, the orderings that the study expects and pictures go to
runs/studies/NAME too. `--results FILE` keeps all figures, and `--from FILE` draws the table and the pictures of them.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from fbitrain.base.command import positive
from fbitrain.base.errors import UserError
from fbitrain.base.files import require_writable, write_text
from fbitrain.checkpoint_folders import discard_all
from fbitrain.studies.plots import draw
from fbitrain.studies.results import outcomes, read_results, write_results
from fbitrain.studies.runs import Run, begin, end, is_finished, is_teacher, overrides, runs, teacher_of, waits_for
from fbitrain.studies.study_file import Study, load_study
from fbitrain.studies.table import table


def main(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study)
    if arguments.results:
        require_writable(arguments.results, "--results")
    folder = arguments.runs / arguments.study.stem
    texts = [text.lower() for text in arguments.only or [""]]
    for text in texts:
        if not any(text in variant.name.lower() for variant in study.variants):
            raise UserError(f"no variant of {arguments.study} has {text!r} in its name")
    wanted = [each for each in runs(study, folder) if any(text in each.variant.name.lower() for text in texts)]
    failed: list[str] = []
    if not (arguments.table or arguments.results_from):
        todo = [each for each in wanted if not is_finished(each)]
        failed = train_all(study, todo, arguments.jobs, arguments.discard)
    results = read_results(study, arguments.results_from) if arguments.results_from else outcomes(study, folder)
    if not results:
        raise UserError("; ".join(failed) or f"nothing of {arguments.study} has finished in {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.results:
        write_results(study, results, arguments.results)
    write_text(folder / "table.md", table(study, results))
    pictures = draw(study, results, folder)
    print(table(study, results))
    print(", ".join(map(str, [folder / "table.md", *pictures])))
    if failed:
        raise UserError("; ".join(failed))
    return 0


def train_all(study: Study, todo: Sequence[Run], jobs: int, discard: bool) -> list[str]:
    """Carries out `todo`, in its order but for runs that wait for others; returns a sentence for each that failed."""
    waiting, running, failed = list(todo), dict[Future[str], Run](), []
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            pending = [*waiting, *running.values()]
            ready = [each for each in waiting if not waits_for(study, each, pending)]
            for each in ready[: jobs - len(running)]:
                waiting.remove(each)
                running[pool.submit(train, study, each, jobs, discard)] = each
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                del running[future]
                failed += [future.result()] if future.result() else []
    for each in waiting:
        missing = ", ".join(other.folder.name for other in waits_for(study, each))
        failed.append(f"{each.folder.name} was not run, because these are not finished: {missing}")
    return failed


def train(study: Study, one: Run, jobs: int, discard: bool) -> str:
    """One run to its end, its output in its folder; returns a sentence if it failed, else an empty one."""
    teacher = teacher_of(study, one)
    if teacher and (problem := release(teacher)):
        return f"{one.folder.name} was not run: {problem}"
    one.folder.mkdir(parents=True, exist_ok=True)
    try:
        verb = "finetune" if begin(study, one).model.pretrained else "pretrain"
    except UserError as error:
        return str(error)
    print(f"{one.folder.name} …", flush=True)
    started = time.perf_counter()
    code = call(one, [verb, study.base, *overrides(study, one)], jobs)
    end(one, time.perf_counter() - started, failed=not is_finished(one))
    if code or not is_finished(one):
        return f"{one.folder.name} failed with exit code {code}, see {one.folder / 'log.txt'}"
    if is_teacher(study, one) and (problem := release(one)):
        return problem
    if discard:
        discard_all(one.folder)
    return ""


def release(one: Run) -> str:
    """Writes out the model of a finished run for those that learn from it; returns a sentence if that failed."""
    if (one.release / "dense" / "config.json").is_file():
        return ""
    code = call(one, ["release", str(one.folder), "--format=dense", "--dtype=float32", f"--out={one.release}"], 1)
    return f"{one.folder.name} could not be released, see {one.folder / 'log.txt'}" if code else ""


def call(one: Run, command: Sequence[str], jobs: int) -> int:
    """Runs a command with its share of the cores, its output in the run's log; returns the exit code."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    with (one.folder / "log.txt").open("a") as output:
        # A world of one needs no launcher, and two launchers would want the same port.
        done = subprocess.run(
            [sys.executable, "-m", "fbitrain", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "LOCAL_SIZE": str(jobs)},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    return done.returncode


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="fbitrain compare", description="Run the variants of a study and compare them."
    )
    commands.add_argument("study", type=Path, help="a study file, such as the repository's launch/studies/recipes.yaml")
    commands.add_argument(
        "--only", action="append", metavar="TEXT", help="only the variants with TEXT in their name; may be given again"
    )
    commands.add_argument("--table", action="store_true", help="run nothing, only sum up what is finished")
    commands.add_argument("--jobs", type=positive, default=1, help="runs at one time; they share the cores (default 1)")
    commands.add_argument(
        "--discard", action="store_true", help="remove a run's checkpoints once it is finished: they are most of it"
    )
    commands.add_argument(
        "--runs", type=Path, default=Path("runs/studies"), help="where runs live (default runs/studies)"
    )
    commands.add_argument("--results", type=Path, metavar="FILE", help="write all figures to FILE, as JSON")
    commands.add_argument(
        "--from", dest="results_from", type=Path, metavar="FILE", help="run nothing, sum up what --results wrote"
    )
    return commands
