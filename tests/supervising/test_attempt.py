"""Attempts with real agents and small programs as ranks; the supervisor's decisions with attempts that are none."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fbitrain.base.errors import UserError
from fbitrain.base.processes import started
from fbitrain.commands.run import parser, places
from fbitrain.supervising import supervisor
from fbitrain.supervising.attempt import Attempt, End, Patience, StopRequest
from fbitrain.supervising.nodes import Node, Reach, of_hostfile, of_ssh
from fbitrain.supervising.supervisor import Rules, Supervisor

PATIENCE = Patience(connect_s=5, silence_s=3, grace_s=5)
TWO = [Node("a", 2), Node("b", 1)]
PRELUDE = """
import json, os, signal, sys, time
rank, pids = int(os.environ["RANK"]), sys.argv[1]
open(f"{pids}/{os.getpid()}", "w").write(f"{rank} {os.environ['LOCAL_RANK']} {os.environ['LOCAL_SIZE']}")
def note(**error):
    json.dump(error, open(os.environ["FBITRAIN_ERROR_FILE"], "w"))
"""


@pytest.fixture
def attempt(tmp_path: Path) -> Callable[..., Attempt]:
    """An attempt of ranks that do what `program` says, on nodes reached by a shell that stands in for ssh."""
    (tmp_path / "pids").mkdir()
    (tmp_path / "ssh").write_text(f'#!/bin/sh\n[ -e {tmp_path}/down-$1 ] && exec sleep 60\nexec sh -c "$2"\n')
    (tmp_path / "ssh").chmod(0o755)

    def make(program: str, nodes: Sequence[Node] = TWO, **more: Any) -> Attempt:
        command = [sys.executable, "-S", "-c", PRELUDE + program, str(tmp_path / "pids")]
        reach = of_ssh(str(tmp_path / "ssh")) if len(nodes) > 1 else Reach()
        usual = {"reach": reach, "patience": PATIENCE, "stop": StopRequest(), "say": str}
        return Attempt(nodes, command=command, **{**usual, **more})

    return make


def ranks(tmp_path: Path) -> dict[int, str]:
    """Process -> what it said of itself."""
    return {int(path.name): path.read_text() for path in (tmp_path / "pids").iterdir()}


def none_is_left(tmp_path: Path) -> bool:
    """A process that was killed takes a moment to go."""
    return not any(started(pid) for pid in ranks(tmp_path))


def test_all_ranks_know_their_place_and_end_well(attempt: Any, tmp_path: Path) -> None:
    program = (
        "assert os.environ['WORLD_SIZE'] == '3' and os.environ['MASTER_ADDR'] == 'a' and os.environ['MASTER_PORT']"
    )
    end = attempt(program).run()
    assert end == End("ended", ranks=3, nodes=("a", "b"))
    assert sorted(ranks(tmp_path).values()) == ["0 0 2", "1 1 2", "2 0 1"]


@pytest.mark.parametrize(
    ("program", "reason", "mends"),
    [
        ("rank == 1 and os.kill(os.getpid(), signal.SIGKILL)", "rank 1 was ended by SIGKILL", True),
        ("rank == 2 and sys.exit(7)", "rank 2 ended with exit code 7; its own last lines say why", True),
        ("note(error='no shards', restart_mends=None); sys.exit(1)", "ended with: no shards", None),
        ("note(error='a spike', restart_mends=False); sys.exit(1)", "ended with: a spike", False),
        (
            "note(error='heard of it', restart_mends=True, echo=True) if rank else sys.exit(9); sys.exit(1)",
            "rank 0 ended with exit code 9; its own last lines say why",
            True,
        ),
    ],
)
def test_a_failure_ends_all(
    attempt: Any, tmp_path: Path, program: str, reason: str, mends: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("fbitrain.supervising.attempt.LAST_WORDS_S", 1.0)
    end = attempt(f"{program}\ntime.sleep(60)").run()
    assert (end.kind, end.restart_mends) == ("failed", mends)
    assert reason in end.reason
    wait_for(lambda: none_is_left(tmp_path), 5)


def test_a_node_that_does_not_answer_is_left_out_and_taken_in_again(attempt: Any, tmp_path: Path) -> None:
    (tmp_path / "down-a").touch()
    patience = replace(PATIENCE, connect_s=1.5)
    end = attempt("assert os.environ['MASTER_ADDR'] == '127.0.0.1'", patience=patience).run()
    assert end == End("ended", ranks=1, nodes=("b",), left_out=("a",))
    end = attempt("", least_ranks=2, patience=patience).run()
    assert (end.kind, end.restart_mends) == ("failed", True)
    assert "1 ranks are left and --min-ranks is 2: of a no answer came" in end.reason
    (tmp_path / "down-a").unlink()
    assert attempt("").run().ranks == 3


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_lost_node_ends_the_attempt_and_leaves_nothing(attempt: Any, tmp_path: Path, number: int) -> None:
    """The agent of node b falls silent, as if its machine had frozen, or its connection ends."""
    program = f"rank == 2 and os.kill(os.getppid(), {int(number)})\ntime.sleep(60)"
    began = time.monotonic()
    end = attempt(program).run()
    assert end.kind == "failed"
    assert end.reason.startswith("node b is lost: ")
    assert time.monotonic() - began < 15
    wait_for(lambda: none_is_left(tmp_path), 5)


def test_ranks_end_when_the_supervisor_does(attempt: Any, tmp_path: Path) -> None:
    child = os.fork()
    if not child:
        attempt("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)").run()
    wait_for(lambda: len(ranks(tmp_path)) == 3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(lambda: none_is_left(tmp_path))


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(("saves", "reason"), [(True, ""), (False, "not all ranks ended well")])
def test_a_stop_reaches_all_ranks(attempt: Any, tmp_path: Path, saves: bool, reason: str) -> None:
    stop = StopRequest()
    handler = "lambda *_: sys.exit(0)" if saves else "signal.SIG_IGN"
    program = f"signal.signal(signal.SIGTERM, {handler})\nopen(f'{{pids}}-{{rank}}', 'w')\ntime.sleep(60)"
    running = attempt(program, stop=stop, patience=replace(PATIENCE, grace_s=1.0))

    def ask() -> None:
        wait_for(lambda: all((tmp_path / f"pids-{rank}").exists() for rank in range(3)))
        stop.note(signal.SIGTERM)

    threading.Thread(target=ask).start()
    end = running.run()
    assert (end.kind, end.reason) == ("stopped", reason)
    wait_for(lambda: none_is_left(tmp_path), 5)


# -- the supervisor --------------------------------------------------------------------------------------------------


class Story:
    """Attempts that end as they are told to, each with the step of its newest checkpoint."""

    def __init__(self, run_dir: Path, *ends: tuple[End, int]) -> None:
        self.run_dir, self.ends, self.said, self.slept = run_dir, list(ends), list[str](), 0.0
        self.stop = StopRequest()

    def attempt(self, number: int) -> End:
        end, step = self.ends.pop(0)
        marker = self.run_dir / "checkpoints" / f"step_{step:08d}" / "COMPLETE.json"
        if step:
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
        if end.kind == "ended":
            (self.run_dir / "FINISHED.json").touch()
        return end

    def run(self, **rules: Any) -> int:
        code = Supervisor(
            self.run_dir, self.attempt, Rules(**{"backoff_s": 0, **rules}), self.stop, self.said.append
        ).run()
        assert not self.ends, "attempts were left out"
        return code

    def logged(self, key: str) -> list[Any]:
        return [json.loads(line)[key] for line in (self.run_dir / "attempts.jsonl").read_text().splitlines()]


def lost(mends: bool | None = True) -> End:
    return End("failed", "rank 1 was ended by SIGKILL", ranks=2, nodes=("a",), restart_mends=mends)


def test_a_run_that_makes_progress_is_restarted_for_ever(tmp_path: Path) -> None:
    story = Story(tmp_path, *((lost(), 3 * i) for i in range(1, 8)), (End("ended", ranks=1), 30))
    assert story.run(restarts=0) == 0
    assert story.logged("step") == [3, 6, 9, 12, 15, 18, 21, 30]
    assert story.logged("from_step") == [0, 3, 6, 9, 12, 15, 18, 21]
    assert story.logged("ranks") == [2] * 7 + [1]


def test_it_gives_up_without_progress(tmp_path: Path) -> None:
    story = Story(tmp_path, (lost(), 3), (lost(), 3), (lost(), 6), (lost(), 6), (lost(), 6), (lost(), 6))
    assert story.run(restarts=2) == 1
    assert story.said[-1] == "gives up: 3 attempts in a row wrote no new checkpoint (--restarts 2)"


def test_an_error_of_the_user_is_not_tried_again(tmp_path: Path) -> None:
    story = Story(tmp_path, (lost(False), 3))
    assert story.run(restarts=5) == 1
    assert story.said[-1] == "gives up: a restart cannot mend that"
    story = Story(tmp_path, (lost(None), 6), (lost(None), 6))
    assert story.run(restarts=5) == 1, "what is not known to pass is tried again only after progress"


def test_it_waits_longer_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    story = Story(tmp_path, (lost(), 0), (lost(), 0), (lost(), 0), (lost(), 5), (End("ended"), 9))
    run = Supervisor(tmp_path, story.attempt, Rules(5, 10), story.stop, story.said.append)
    run.sleep = lambda seconds: clock.__setitem__(0, clock[0] + seconds)
    assert run.run() == 0
    assert [line for line in story.said if "again in" in line] == [f"starts again in {s} s" for s in (10, 20, 40, 10)]


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in on PATH that notes what it is asked."""
    asked = tmp_path / "asked"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{asked}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    return asked


@pytest.mark.parametrize(("left_s", "requeued"), [(100, True), (10_000, False)])
def test_a_job_whose_time_is_over_is_queued_again(
    tmp_path: Path, monkeypatch: Any, scontrol: Path, left_s: float, requeued: bool
) -> None:
    end = time.time() + 10_000
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(end)))

    def attempt(number: int) -> End:
        monkeypatch.setattr(supervisor.time, "time", lambda: end - left_s)
        (tmp_path / "STOPPED.json").write_text('{"reason": "the end of the job\'s time"}')
        return End("ended", ranks=2)

    said: list[str] = []
    assert Supervisor(tmp_path, attempt, Rules(margin_s=300), StopRequest(), said.append).run() == 0
    assert scontrol.exists() == requeued
    assert said[-1].startswith("stopped by the end of the job's time; ")
    if requeued:
        assert scontrol.read_text() == "requeue 41\n"
        monkeypatch.setattr(supervisor.time, "time", lambda: end - 10)
        assert Supervisor(tmp_path, lost, Rules(margin_s=300), StopRequest(), said.append).run() == 0
        assert scontrol.read_text() == "requeue 41\nrequeue 41\n", "no attempt fits into what is left"


def test_the_nodes_of_a_slurm_job(tmp_path: Path, monkeypatch: Any, scontrol: Path, attempt: Any) -> None:
    """srun and scontrol are stand-ins: they show what is asked of them, not what SLURM does."""
    scontrol.with_name("scontrol").write_text(
        "#!/bin/sh\n[ \"$*\" = 'show hostnames n[1-2]' ] && printf 'n1\\nn2\\n'\n"
    )
    (tmp_path / "srun").write_text(
        f'#!/bin/sh\nwhile [ "${{1#-}}" != "$1" ]; do echo "$1" >>{scontrol}; shift; done\nexec "$@"\n'
    )
    (tmp_path / "srun").chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "12"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    nodes, reach = places(parser().parse_args(["--", "pretrain", "my.yaml"]))
    assert nodes == [Node("n1", 2), Node("n2", 2)]
    end = attempt("assert os.environ['MASTER_ADDR'] == 'n1'", nodes, reach=reach).run()
    assert end == End("ended", ranks=4, nodes=("n1", "n2"))
    asked = scontrol.read_text().split()
    assert {"--nodelist=n1", "--nodelist=n2", "--overlap", "--cpus-per-task=12"} <= set(asked)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("a slots=2\n# b slots=1\n\n  c slots=1 # spare\n", ""),
        ("a slots=2\nb\n", "line 2 of the hostfile"),
        ("a slots=0", "line 1 of the hostfile"),
        ("# a slots=2", "names no node"),
    ],
)
def test_a_hostfile(tmp_path: Path, lines: str, fault: str) -> None:
    (tmp_path / "hosts").write_text(lines)
    if not fault:
        assert of_hostfile(tmp_path / "hosts") == [Node("a", 2), Node("c", 1)]
        return
    with pytest.raises(UserError, match=fault):
        of_hostfile(tmp_path / "hosts")
