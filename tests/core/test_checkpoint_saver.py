"""What a save promises, with the writer process and without: one rank and a handful of tensors instead of an engine."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fbitrain import checkpoint_snapshot
from fbitrain.base.errors import UserError
from fbitrain.base.processes import started
from fbitrain.checkpoint import Saver
from fbitrain.checkpoint_files import TrainerState, fixed_tensors, load_weights, trainer_state
from fbitrain.checkpoint_marker import damage
from fbitrain.config import load_config
from fbitrain.shards import Fragment
from tests.launch import faulty_writer

N = 600_000  # elements: more than one chunk of a file


class Shards:
    """What a Saver asks of an engine's shards."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight, self.moment = torch.randn(2, N, generator=generator)
        self.state_starts: dict[str, int] = {}

    def fragments(self) -> Iterator[Fragment]:
        yield Fragment("w", (N + 7,), 0, N, self.weight, {"exp_avg": self.moment})
        yield Fragment("w", (N + 7,), N, N + 7, self.weight[:7], {"exp_avg": self.moment[:7]})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"w": (N + 7,)}


class Engine:
    """What a Saver asks of an engine."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.shards = Shards()

    def fixed_tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [("scale", torch.tensor([0.5, 3.0])), ("mask", torch.arange(37, dtype=torch.uint8))]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


Make = Callable[..., Saver]


@pytest.fixture
def make(workspace: Any, tmp_path: Path) -> Iterator[Make]:
    """Makes the saver of the run in tmp_path/run."""
    made: list[Saver] = []

    def saver(*overrides: str) -> Saver:
        config = load_config(workspace.config, [f"run.dir={tmp_path}", "run.name=run", *overrides])
        made.append(Saver(Engine(), config))
        return made[-1]

    yield saver
    for one in made:
        one.close()


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def built_in(name: str) -> None:
        monkeypatch.setenv("WRITER_FAULT", name)
        monkeypatch.setattr(checkpoint_snapshot, "COMMAND", faulty_writer.COMMAND)

    return built_in


def save(saver: Saver, step: int) -> None:
    saver.save(TrainerState(step, 10 * step), {"lanes": [step]}, {"one": [["a.jsonl", 1000]]})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_a_save_holds_the_moment_in_which_it_began(make: Make, tmp_path: Path, asynchronous: str) -> None:
    saver = make(f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep=2")
    shards = saver._engine.shards
    wanted = {}
    for step in (1, 2, 3):
        wanted[step] = shards.weight.clone()
        save(saver, step)
        shards.weight.mul_(-1.5)
    saver.wait()
    assert not saver.cannot_write()
    assert names(tmp_path) == ["step_00000002", "step_00000003"]
    for step in (2, 3):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        assert damage(folder) == ""
        assert torch.equal(load_weights(folder)["w"][:N], wanted[step])
        assert trainer_state(folder).tokens == 10 * step
        assert torch.equal(fixed_tensors(folder)["mask"], torch.arange(37, dtype=torch.uint8))
        assert not list(folder.glob(".*")), "a temporary file stayed"


def test_both_ways_write_the_same_bytes(make: Make, tmp_path: Path) -> None:
    written = []
    for asynchronous in ("true", "false"):
        saver = make(f"checkpoint.asynchronous={asynchronous}")
        save(saver, 1)
        saver.wait()
        folder = tmp_path / "run" / "checkpoints" / "step_00000001"
        written.append({path.name: path.read_bytes() for path in folder.glob("*") if path.name != "config.yaml"})
    written = [{name: content for name, content in files.items() if name != "COMPLETE.json"} for files in written]
    assert written[0] == written[1]
    assert (tmp_path / "run" / "checkpoints" / "step_00000001.abandoned").is_dir()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fill_the_disk", r"^the disk of .*checkpoints is full \(.*: checkpoint step_00000002 was not written, older"),
        ("die", r"^checkpoint step_00000002 could .*: its writer, process \d+, was killed by signal 9 .*untouched$"),
        ("fail", "could not be written to .*: KeyError: 'a fault of ours'; older ones are untouched$"),
    ],
)
def test_a_writer_that_fails_is_told_and_the_older_checkpoint_stays(
    make: Make, fault: Callable[[str], None], tmp_path: Path, name: str, words: str
) -> None:
    fault(name)
    saver = make()
    save(saver, 1)
    save(saver, 2)
    deadline = time.monotonic() + 60
    while not saver.cannot_write():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UserError, match=words) as told:
        saver.wait()
    assert told.value.on_all_ranks
    assert names(tmp_path) == ["step_00000001"]
    assert damage(tmp_path / "run" / "checkpoints" / "step_00000001") == ""
    saver.wait()  # nothing is in flight


def test_a_fault_that_nobody_looked_for_is_told_by_the_next_save(make: Make, fault: Callable[[str], None]) -> None:
    fault("fill_the_disk")
    saver = make()
    save(saver, 1)
    save(saver, 2)
    with pytest.raises(UserError, match="checkpoint step_00000002 was not written"):
        save(saver, 3)


def test_a_save_waits_for_the_one_in_flight(
    make: Make, fault: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fault("slow")
    saver = make()
    began = time.monotonic()
    save(saver, 1)
    assert time.monotonic() - began < 2, "the rank waited for its writer"
    assert names(tmp_path) in ([], ["step_00000001.tmp"]) if (tmp_path / "run" / "checkpoints").is_dir() else True
    save(saver, 2)
    assert names(tmp_path)[0] == "step_00000001"
    saver.wait()
    said = capsys.readouterr().out.splitlines()
    assert [line.split(str(tmp_path))[0] for line in said] == ["", "saved ", "saved "]
    assert said[0].endswith("step_00000001 is still being written; the save of step_00000002 waits for it")
    assert "training stood still for" in said[1]


def test_an_idle_writer_that_was_killed_is_replaced(make: Make, tmp_path: Path) -> None:
    saver = make()
    save(saver, 1)
    saver.wait()
    assert saver._writer is not None
    os.kill(saver._writer.process.pid, signal.SIGKILL)
    saver._writer.process.wait()
    save(saver, 2)
    saver.wait()
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_run_that_ends_in_the_middle_of_a_write(
    make: Make, fault: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can be finished is; a writer that hangs is not waited for for ever, and leaves the older checkpoint."""
    saver = make()
    save(saver, 1)
    saver.close()
    assert names(tmp_path) == ["step_00000001"]
    fault("hang")
    monkeypatch.setattr(checkpoint_snapshot, "FAREWELL_SECONDS", 1.0)
    saver = make()
    for step in (2, 3):
        save(saver, step)
    assert saver._writer is not None
    pid = saver._writer.process.pid
    saver.close()
    assert not started(pid)
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003.tmp"]


def test_signals_of_the_process_group_leave_the_writer_alone(make: Make, fault: Callable[[str], None]) -> None:
    fault("slow")
    saver = make()
    save(saver, 1)
    assert saver._writer is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(saver._writer.process.pid, number)
    saver.wait()


def test_without_memory_for_the_copy_the_sentence_says_what_to_set(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(UserError, match=r"no room for 0\.0 GB of memory .*; set checkpoint\.asynchronous=false"):
        save(make(), 1)
