"""Run a study and say what came of it: `compare.py launch/studies/NAME.yaml [--only TEXT] [--table]`.

Each variant is a run of launch/finetune.py in runs/studies/NAME; finished ones are kept. The table, the orderings that
the study expects and a picture go to runs/studies/NAME too.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fbitrain.errors import UserError
from fbitrain.files import replacing, write_text
from fbitrain.launch.cli import positive, run
from fbitrain.study import Outcome, Run, Study, add_seconds, begin, is_finished, load_study, outcomes, runs, verdicts

LAUNCH = Path(__file__).parent


def main(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study)
    folder = arguments.runs / arguments.study.stem
    wanted = [each for each in runs(study, folder) if arguments.only.lower() in each.variant.name.lower()]
    if not wanted:
        raise UserError(f"no variant of {arguments.study} has {arguments.only!r} in its name")
    failed: list[str] = []
    if not arguments.table:
        todo = [each for each in wanted if not is_finished(each)]
        with ThreadPoolExecutor(arguments.jobs) as jobs:
            problems = list(jobs.map(lambda each: train(study, each, arguments.jobs, arguments.discard), todo))
        failed = [problem for problem in problems if problem]
    results = outcomes(study, folder)
    if not results:
        raise UserError("; ".join(failed) or f"nothing of {arguments.study} has finished in {folder}")
    write_text(folder / "table.md", table(study, results))
    draw(results, folder / "perplexity.png")
    print(table(study, results))
    print(f"{folder / 'table.md'}, {folder / 'perplexity.png'}")
    if failed:
        raise UserError("; ".join(failed))
    return 0


def train(study: Study, one: Run, jobs: int, discard: bool) -> str:
    """One run to its end, its output in its folder; returns a sentence if it failed, else an empty one."""
    one.folder.mkdir(parents=True, exist_ok=True)
    try:
        begin(one, study.base)
    except UserError as error:
        return str(error)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    print(f"{one.folder.name} …", flush=True)
    log, started = one.folder / "log.txt", time.perf_counter()
    with log.open("a") as output:
        # A world of one needs no launcher, and two launchers would want the same port.
        done = subprocess.run(
            [sys.executable, str(LAUNCH / "finetune.py"), study.base, *one.overrides],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads, "LOCAL_SIZE": str(jobs)},
            stdin=subprocess.DEVNULL,
            check=False,
        )
    add_seconds(one, time.perf_counter() - started)
    if done.returncode or not is_finished(one):
        return f"{one.folder.name} failed with exit code {done.returncode}, see {log}"
    if discard:
        shutil.rmtree(one.folder / "checkpoints")
    return ""


def table(study: Study, results: Sequence[Outcome]) -> str:
    """Markdown: a row per variant, then the orderings."""
    rows = [
        "| variant | perplexity (each seed) | bits per weight | training tokens | minutes |",
        "|---|---|---|---|---|",
    ]
    for outcome in results:
        each = ", ".join(f"{value:,.2f}" for value in outcome.perplexities)
        minutes = f"{outcome.seconds / 60:.1f}" if math.isfinite(outcome.seconds) else "not timed"
        costs = f"{outcome.bits_per_weight:.2f} | {outcome.tokens:,} | {minutes}"
        rows.append(f"| {outcome.name} | {each} | {costs} |")
    rows += ["", "| expected to be lower | than | |", "|---|---|---|"]
    rows += [f"| {low} | {high} | {verdict} |" for low, high, verdict in verdicts(study, results)]
    return "\n".join(rows) + "\n"


def draw(results: Sequence[Outcome], path: Path) -> None:
    """Perplexity over bits per weight, a point per seed."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(results) + 1.2), layout="constrained")
    for y, outcome in enumerate(results):
        finite = [value for value in outcome.perplexities if math.isfinite(value)]
        axes.plot(finite, [y] * len(finite), "o", color="tab:blue", alpha=0.7)
    labels = [f"{outcome.name} ({outcome.bits_per_weight:.2f} bits)" for outcome in results]
    axes.set(xscale="log", xlabel="held-out perplexity, a point per seed", yticks=range(len(results)))
    axes.set_yticklabels(labels, fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    pyplot.close(figure)


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="compare.py", description="Run the variants of a study and compare them.")
    commands.add_argument("study", type=Path, help="a study file; the shipped ones are in launch/studies")
    commands.add_argument("--only", default="", metavar="TEXT", help="only the variants with TEXT in their name")
    commands.add_argument("--table", action="store_true", help="run nothing, only sum up what is finished")
    commands.add_argument("--jobs", type=positive, default=1, help="runs at one time; they share the cores (default 1)")
    commands.add_argument(
        "--discard", action="store_true", help="remove a run's checkpoints once it is finished: they are most of it"
    )
    commands.add_argument(
        "--runs", type=Path, default=Path("runs/studies"), help="where runs live (default runs/studies)"
    )
    return commands


if __name__ == "__main__":
    sys.exit(run(main, parser()))
