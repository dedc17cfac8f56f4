"""debug.profile_steps: whole files for the steps that are named, or none."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fbitrain import profiling
from fbitrain.config import Config, DebugConfig, RunConfig
from fbitrain.profiling import StepProfile


class Interval:
    def __init__(self) -> None:
        self.pauses: list[str] = []

    def pause(self, activity: str) -> None:
        self.pauses.append(activity)

    def run(self) -> None:
        self.pauses.append("")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)


def profile_of(run_dir: Path, steps: list[int], interval: Any = None) -> StepProfile:
    config = replace(Config(), run=RunConfig(dir=str(run_dir.parent), name=run_dir.name))
    config = replace(config, debug=DebugConfig(profile_steps=steps))
    return StepProfile(config, 3, torch.device("cpu"), interval or Interval())


def take_steps(profile: StepProfile, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profile.before(step)
        torch.ones(100, 100) @ torch.ones(100, 100)
        profile.after(step)


def test_the_named_steps_are_profiled(tmp_path: Path) -> None:
    interval = Interval()
    profile = profile_of(tmp_path, [2, 3], interval)
    take_steps(profile, 1, 5)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps_2_to_3_rank_3.json"
    events = json.loads(file.read_text())["traceEvents"]
    assert len([event for event in events if event.get("name") == "aten::mm"]) == 2
    assert any(event.get("name") == "[memory]" for event in events)
    assert interval.pauses == ["profiling", ""] * 2


def test_a_run_without_such_steps_makes_no_file(tmp_path: Path) -> None:
    take_steps(profile_of(tmp_path, []), 1, 3)
    assert not [*tmp_path.iterdir()]


def test_a_run_that_ends_before_leaves_no_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = profile_of(tmp_path, [2, 9])
    take_steps(profile, 1, 4)
    profile.close()
    assert "the run ended before step 9: the profile from step 2 on is not written" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_said_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(profiling, "_require_written", full)
    take_steps(profile_of(tmp_path, [1, 1]), 1, 1)
    assert "cannot be written: No space left on device; the run goes on" in capsys.readouterr().out
    assert not [*(tmp_path / "profile").iterdir()]


def test_a_file_that_was_cut_short_is_found(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    file.write_text('{"traceEvents": [{"ph": "X"')
    with pytest.raises(OSError, match="cut short"):
        profiling._require_written(file)
