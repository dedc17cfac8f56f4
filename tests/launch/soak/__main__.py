"""A run on three nodes that are network namespaces, disturbed again and again, beside one that is not.

    python -m tests.launch.soak [--kinds KIND …] [--times N] [--folder DIR]

As root, in the checkout. Prints a table of what each kind of fault cost, and whether the documents and the losses are
those of the undisturbed run. The exit code is 1 if they are not.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

from tests.conftest import write_shard, write_teacher
from tests.launch.soak.faults import Result, Scene, inflict
from tests.launch.soak.network import Network, why_not
from tests.launch.soak.run import EVERY, SoakRun

TIMES = {
    **{"rank killed": 4, "rank 0 killed": 2, "rank stopped (SIGSTOP)": 2, "agent of a node killed": 2},
    **{"node cut off, later returned": 4, "node lost whole, later returned": 3, "node slowed to 4 Mbit/s": 2},
    **{"disk full at a checkpoint": 2, "rank killed, newest checkpoint damaged": 2, "slow disk (fsync 1 s)": 1},
    **{"supervisor stopped (SIGTERM)": 1, "supervisor killed": 1},
}
BETWEEN = 2 * EVERY  # steps from one fault to the next
DISK = "64m"


def prepare(folder: Path) -> None:
    vocab_size = write_teacher(folder / "tokenizer")  # its tokenizer is all that is wanted
    generator = random.Random(0)
    for shard in range(6):
        (folder / "shards").mkdir(exist_ok=True)
        write_shard(folder / "shards" / f"{shard}.jsonl", generator, 4000)
    (folder / "config.yaml").write_text(
        f"""
model: {{vocab_size: {vocab_size}, n_layers: 1, n_heads: 2, d_model: 32, d_ff: 48, max_seq_len: 64}}
distill: {{kd_weight: 0, ce_weight: 1}}
data:
  sources: [{{name: words, paths: [{folder}/shards]}}]
  tokenizer: {folder}/tokenizer
  seq_len: 24
  n_lanes: 12
  n_workers: 0
optim: {{lr: 1e-3, warmup_steps: 2, schedule: wsd, cooldown_steps: 0}}
train: {{micro_batch_size: 1, global_batch_tokens: 288, collective_timeout_s: 30}}
engine: {{precision: fp32, threads_per_rank: 1, comm_timeout_s: 30}}
checkpoint: {{every: {EVERY}, keep: 3}}
metrics: {{every: 1}}
eval: {{every: 0}}
debug: {{log_documents: true}}
"""
    )


def soak(folder: Path, kinds: list[str], seed: int) -> tuple[SoakRun, list[Result]]:
    """The disturbed run, from its first step to its end, and what each fault cost it."""
    rng = random.Random(seed)
    results = []
    with Network(3) as network:
        run = SoakRun(folder, "disturbed", [f"train.total_steps={total_steps(kinds)}"], network)
        scene = Scene(run, network.nodes, folder / "runs", rng)
        run.start()
        try:
            for i, kind in enumerate(kinds):
                scene.await_step(max(run.step(), BETWEEN * i) + EVERY + rng.randrange(EVERY))
                results.append(inflict(kind, scene))
                print(f"{time.strftime('%H:%M:%S')} {i + 1}/{len(kinds)} {results[-1]}", flush=True)
            assert run.process.wait(1200) == 0, run.output[-3000:]
        finally:
            run.end()
    return run, results


def total_steps(kinds: list[str]) -> int:
    return 2 * BETWEEN * (len(kinds) + 1)


def table(results: list[Result]) -> str:
    rows = [
        "| kind | times | recovered | seconds lost: median, most | steps done again: most |",
        "|---|---|---|---|---|",
    ]
    of_kind = defaultdict(list)
    for result in results:
        of_kind[result.kind].append(result)
    for kind, found in of_kind.items():
        seconds = [result.seconds for result in found]
        lost = f"{median(seconds):.0f}, {max(seconds):.0f}" if any(seconds) else "none"
        rows.append(f"| {kind} | {len(found)} | {len(found)} | {lost} | {max(r.steps for r in found)} |")
    return "\n".join(rows)


def compare(disturbed: SoakRun, alone: SoakRun) -> bool:
    """Says how the two runs differ, and whether that is rounding."""
    mine, theirs = disturbed.documents(), alone.documents()
    lost = sum((theirs[step] - mine.get(step, theirs[step] - theirs[step])).total() for step in theirs)
    more = sum((mine[step] - theirs.get(step, mine[step] - mine[step])).total() for step in mine)
    print(f"documents: {sum(c.total() for c in theirs.values())} in {len(theirs)} steps, {lost} lost, {more} too many")
    a, b = disturbed.losses(), alone.losses()
    assert a.keys() == b.keys(), "the runs have other steps"
    worst = max(abs(a[step] - b[step]) / b[step] for step in a)
    last = sorted(a)[-50:]
    ends = [sum(losses[step] for step in last) / len(last) for losses in (a, b)]
    print(f"losses: at most {worst:.1e} apart, relatively; mean of the last 50 steps {ends[0]:.6f} and {ends[1]:.6f}")
    return not lost and not more and abs(ends[0] - ends[1]) < 0.01 * ends[1]


def main() -> int:
    commands = argparse.ArgumentParser(prog="python -m tests.launch.soak", description=__doc__.splitlines()[0])
    commands.add_argument("--kinds", nargs="+", choices=TIMES, default=list(TIMES), metavar="KIND")
    commands.add_argument("--times", type=int, help="of each kind; default: as often as the documentation's table says")
    commands.add_argument("--seed", type=int, default=0)
    commands.add_argument("--folder", type=Path, help="kept; default: a temporary one")
    arguments = commands.parse_args()
    if reason := why_not():
        print(f"the soak cannot run: {reason}", file=sys.stderr)
        return 1
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="fbitrain-soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in arguments.kinds for _ in range(arguments.times or TIMES[kind])]
    random.Random(arguments.seed).shuffle(kinds)
    prepare(folder)
    (folder / "runs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "soak", str(folder / "runs")], check=True)
    try:
        disturbed, results = soak(folder, kinds, arguments.seed)
        alone = SoakRun(folder, "alone", [f"train.total_steps={total_steps(kinds)}"])
        alone.start()
        assert alone.process.wait(3000) == 0, alone.output[-3000:]
        print(f"{len(results)} faults, {len({result.kind for result in results})} kinds\n{table(results)}")
        return 0 if compare(disturbed, alone) else 1
    finally:
        subprocess.run(["umount", "-l", str(folder / "runs")], check=False)


if __name__ == "__main__":
    sys.exit(main())
