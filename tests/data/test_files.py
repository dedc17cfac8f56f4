"""Files of the data room's commands: whole or not there, and nothing deleted that is not ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fbitrain.base.errors import UserError
from fbitrain.base.files import lock_folder, replacing, scratch_folder, write_json


def test_a_file_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "list.npz"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), replacing(path) as temporary:
        temporary.write_text("half\ud800", encoding="utf-8")
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_scratch_folder_is_cleared_without_following_links(tmp_path: Path) -> None:
    outside, scratch = tmp_path / "outside", tmp_path / "scratch"
    for folder in (outside, scratch / "buckets"):
        folder.mkdir(parents=True)
        (folder / "rows").write_text("rows")
    (scratch / "link").symlink_to(outside)
    with scratch_folder(scratch) as folder:
        assert list(folder.iterdir()) == []
        (folder / "rows_0").write_text("rows")
    assert not scratch.exists()
    assert (outside / "rows").exists()


def test_a_scratch_folder_goes_with_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch_folder(tmp_path / "scratch"):
        raise ZeroDivisionError
    assert not (tmp_path / "scratch").exists()


def test_links_are_not_followed(tmp_path: Path) -> None:
    target, run_dir = tmp_path / "target", tmp_path / "run"
    run_dir.mkdir()
    target.mkdir()
    (target / "file").write_text("mine")
    (run_dir / ".lock").symlink_to(target / "file")
    with pytest.raises(OSError, match="symbolic links"):
        lock_folder(run_dir)
    (tmp_path / "scratch").symlink_to(target)
    with (
        pytest.raises(UserError, match="scratch is a link, and what it leads to would be cleared"),
        scratch_folder(tmp_path / "scratch"),
    ):
        raise AssertionError
    (run_dir / f".list.json.{os.getpid()}.tmp").symlink_to(target / "file")  # a name that could be foreseen
    write_json(run_dir / "list.json", [1])
    assert (target / "file").read_text() == "mine"
