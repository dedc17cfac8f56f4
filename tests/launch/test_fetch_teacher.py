"""launch/fetch_teacher.py: the teacher downloaded once, checked and exported."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fbitrain.base.files import sha256_of
from fbitrain.commands import fetch_teacher
from fbitrain.commands.verbs import call
from fbitrain.loading.gguf_export import EXPORT_MARKER
from tests.core.tiny_teacher import V, load, tiny_llama, write_gguf


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny package in place of the real one, with its checksums."""
    inside = tmp_path / "package" / fetch_teacher.GGUF
    inside.parent.mkdir(parents=True)
    write_gguf(inside, tiny_llama(tied=True))
    archive = shutil.make_archive(str(tmp_path / "wheel"), "zip", tmp_path / "package")
    wheel = Path(archive).rename(tmp_path / fetch_teacher.WHEEL)
    monkeypatch.setattr(fetch_teacher, "WHEEL_SHA256", sha256_of(wheel))
    monkeypatch.setattr(fetch_teacher, "GGUF_SHA256", sha256_of(inside))
    return wheel


def pip_that(deliver: Path | None) -> Any:
    """A stand-in for running pip: puts `deliver` where pip was asked to download to, or fails as without a network."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "pip"]
        if deliver is None:
            return subprocess.CompletedProcess(
                command, 1, stderr="WARNING: Retrying\nERROR: No matching distribution\n"
            )
        shutil.copy(deliver, Path(command[command.index("--dest") + 1]) / fetch_teacher.WHEEL)
        return subprocess.CompletedProcess(command, 0, stderr="")

    return run


def test_fetch_downloads_once_and_then_reuses(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache" / "teacher"
    monkeypatch.setattr(subprocess, "run", pip_that(wheel))
    assert call(["fetch-teacher", "--out", str(out)]) == 0
    assert load(out).vocab_size == V
    assert sorted(child.name for child in out.parent.iterdir()) == sorted([fetch_teacher.WHEEL, "teacher"])
    monkeypatch.setattr(subprocess, "run", pip_that(None))
    capsys.readouterr()
    assert call(["fetch-teacher", "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"reusing {out}: it is complete")
    (out / EXPORT_MARKER).write_text("{}")  # made again from the package at hand
    assert call(["fetch-teacher", "--out", str(out)]) == 0
    assert f"reusing {out.parent / fetch_teacher.WHEEL}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cached", "delivered", "message"),
    [
        (True, None, "has the wrong checksum .*; delete it and run this again"),
        (False, "wrong", "has the wrong checksum .*; pip's index serves another file"),
        (False, None, r"could not be downloaded \(pip: No matching distribution\); check the network"),
    ],
)
def test_fetch_fails_in_one_sentence_and_leaves_nothing(
    cached: bool,
    delivered: str | None,
    message: str,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    wrong = tmp_path / "wrong.whl"
    wrong.write_bytes(wheel.read_bytes()[:-1])
    if cached:
        shutil.copy(wrong, cache / fetch_teacher.WHEEL)
    monkeypatch.setattr(subprocess, "run", pip_that(wrong if delivered else None))
    assert call(["fetch-teacher", "--out", str(cache / "teacher")]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert [child.name for child in cache.iterdir()] == ([fetch_teacher.WHEEL] if cached else [])


def test_fetch_wants_room_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * 2**20))
    assert call(["fetch-teacher", "--out", str(tmp_path / "cache" / "teacher")]) == 1
    assert "has 10 MiB free, the teacher needs 800 MiB" in capsys.readouterr().err
