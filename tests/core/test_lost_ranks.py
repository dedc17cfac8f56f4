"""Which rank was lost, as each of the others can tell; processes stand in for ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fbitrain import lost_ranks
from fbitrain.base.errors import UserError
from fbitrain.base.processes import started
from fbitrain.lost_ranks import NOTE, Peers, Process, lost_ranks_named

BROKEN = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:554] Connection closed by peer [127.0.0.1]:4711")


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, other: subprocess.Popen[bytes]) -> list[Process]:
    """This process as rank 0, and `other` as rank 1 of the same machine; a test may add more before it asks."""
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr(lost_ranks, "PATIENCE_S", 0.5)
    me = lost_ranks._own_process()
    found = [me, replace(me, rank=1, pid=other.pid, started=started(other.pid))]

    def gather(into: list[Any], mine: Any) -> None:
        into[:] = found

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    return found


def test_a_rank_of_this_machine_is_named(world: list[Process], other: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised, lost_ranks_named(tmp_path):  # noqa: PT012 - it dies within
        other.kill()  # not waited for: it stays as a zombie
        raise BROKEN
    words = str(raised.value)
    assert words.startswith(f"rank 1 (process {other.pid} on {world[0].host}) ended in the middle of the run; ")
    assert "rank 0" not in words
    note = json.loads((tmp_path / NOTE).read_text())
    assert (note["ranks"], note["seen_by"]) == ([1], 0)


def test_one_rank_says_it_and_the_others_are_silent(
    world: list[Process], other: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    first, second = Peers(tmp_path), Peers(tmp_path)
    other.kill()
    other.wait()
    with pytest.raises(UserError, match="rank 1"):
        first.explain(BROKEN)
    with pytest.raises(UserError) as raised:
        second.explain(BROKEN)
    assert raised.value.said_elsewhere


def test_of_two_that_see_it_at_once_one_says_it(world: list[Process], tmp_path: Path) -> None:
    first, second = Peers(tmp_path), Peers(tmp_path)
    note = tmp_path / NOTE
    note.touch()  # as while the first writes it
    assert not second.claim(world[1:])
    note.unlink()
    assert first.claim(world[1:])
    assert not second.claim(world[1:])
    assert json.loads(note.read_text())["ranks"] == [1]


def test_the_note_of_an_earlier_launch_silences_nobody(
    world: list[Process], other: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    peers = Peers(tmp_path)
    (tmp_path / NOTE).write_text(json.dumps({"ranks": [7], "seen_by": 3, "launch": "node 12 34"}))
    other.kill()
    with pytest.raises(UserError, match="rank 1") as raised:
        peers.explain(BROKEN)
    assert not raised.value.said_elsewhere


def test_a_run_folder_that_takes_no_note(world: list[Process], other: subprocess.Popen[bytes], tmp_path: Path) -> None:
    peers = Peers(tmp_path / "gone")
    other.kill()
    with pytest.raises(UserError, match="rank 1"):
        peers.explain(BROKEN)


def test_where_no_rank_is_gone_the_sentence_says_what_is_known(world: list[Process], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all ranks are there, so one of them hangs, or took longer than engine\.comm"):
        Peers(tmp_path).explain(BROKEN)
    far = [replace(world[0], rank=rank, host=f"node{rank}", machine=f"node{rank}") for rank in (2, 3)]
    world += far
    (tmp_path / NOTE).unlink()
    with pytest.raises(UserError, match=r"a rank of another node \(node2, node3\) was lost, which of them"):
        Peers(tmp_path).explain(BROKEN)


def test_another_error_is_raised_as_it_is(world: list[Process], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), lost_ranks_named(tmp_path):
        raise RuntimeError("shapes differ")
    assert not (tmp_path / NOTE).exists()


def test_a_rank_that_only_waits_says_it_too(
    world: list[Process],
    other: subprocess.Popen[bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(lost_ranks, "LOOK_S", 0.05)
    with lost_ranks_named(tmp_path):
        other.kill()
        for _ in range(200):
            if (tmp_path / NOTE).exists():
                break
            lost_ranks.time.sleep(0.05)
        lost_ranks.time.sleep(0.2)
    assert f"rank 1 (process {other.pid} on " in capsys.readouterr().err
