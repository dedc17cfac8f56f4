"""A run that is killed, and continued on fewer and on more ranks, reads every document once: by its own log of them."""

from __future__ import annotations

import json
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.launch
N_DOCUMENTS = 40  # in each of three shards


def lines_of(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Per rank the lines of its document log; a line that the kill cut short is none."""
    found = {}
    for path in sorted(run_dir.glob("documents_rank*.jsonl")):
        lines = path.read_text().split("\n")[:-1]
        found[path.name] = [json.loads(line) for line in lines if line.endswith("}")]
    return found


def documents_between(run_dir: Path, start: dict[str, int], stop: dict[str, int], last_step: int) -> Iterator[str]:
    """What a launch logged up to `last_step`; later steps were lost with the kill, and the next launch repeats them.

    `start` and `stop` are the numbers of lines in the logs before it and after it.
    """
    for name, lines in lines_of(run_dir).items():
        for line in lines[start.get(name, 0) : stop.get(name, 0)]:
            if line["step"] <= last_step:
                yield from line["documents"]


def resumed_step(launched: Any) -> int:
    found = re.search(r"resumed from .*step_(\d+)", launched.output)
    assert found, launched.output[-3000:]
    return int(found[1])


def test_killed_and_continued_on_other_numbers_of_ranks(launch: Any, tmp_path: Path) -> None:
    rng = random.Random(20)
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        texts = [
            " ".join(rng.choices(("one", "bit", "per", "weight"), k=rng.randint(3, 60))) for _ in range(N_DOCUMENTS)
        ]
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / "shards" / f"{shard}.jsonl").write_text("".join(lines))
    settings = [
        f"data.sources=[{{name: a, paths: [{tmp_path}/shards]}}]",
        *("data.n_lanes=6", "data.shuffle_block=5", "debug.log_documents=true", "eval.every=0", "checkpoint.every=2"),
        *("data.seq_len=48", "train.global_batch_tokens=576", "train.total_steps=24", "data.n_workers=1"),
    ]
    seen: Counter[str] = Counter()
    before: dict[str, int] = {}
    running = launch.start("documents", *settings, ranks=2)
    for ranks in (1, 3):
        kill_at = sum(before.values()) + rng.randint(6, 14)
        running.wait_for(lambda at=kill_at, now=running: sum(map(len, lines_of(now.run_dir).values())) >= at)
        running.wait_for(lambda now=running: any(now.run_dir.glob("checkpoints/*/COMPLETE.json")))
        running.signal(signal.SIGKILL)
        running.wait_for_all()
        lost = running
        logged = {name: len(lines) for name, lines in lines_of(lost.run_dir).items()}
        running = launch.start("documents", *settings, ranks=ranks)
        running.wait_for(lambda now=running: "resumed from" in now.output)
        seen.update(documents_between(lost.run_dir, before, logged, resumed_step(running)))
        before = logged
    assert running.wait() == 0, running.output[-3000:]
    logged = {name: len(lines) for name, lines in lines_of(running.run_dir).items()}
    seen.update(documents_between(running.run_dir, before, logged, 24))
    first_pass = {name: count for name, count in seen.items() if "#" not in name}
    assert first_pass == {f"a/{shard}.jsonl:{line}": 1 for shard in range(3) for line in range(N_DOCUMENTS)}
    assert any("#2" in name for name in seen), "the run was too short to prove anything"
