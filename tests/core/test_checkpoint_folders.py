"""Which checkpoint a launch goes on from, and that nothing is touched but what fbitrain wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fbitrain import checkpoint_folders
from fbitrain.base.errors import UserError
from fbitrain.checkpoint_folders import (
    abandon_newer,
    choose,
    complete_checkpoints,
    discard_all,
    discard_unfinished,
    strangers,
)
from fbitrain.checkpoint_writer import remove
from fbitrain.config import Config, load_config
from tests.checkpoints import write_checkpoint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with checkpoints after 3, 6 and 9 steps."""
    for step in (3, 6, 9):
        write_checkpoint(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    return tmp_path / "run"


@pytest.fixture
def config(workspace: Any, run_dir: Path) -> Any:
    """Makes the run's configuration with train.resume as given."""
    return lambda resume: load_config(
        workspace.config, [f"run.dir={run_dir.parent}", "run.name=run", f"train.resume={resume}"]
    )


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def begin(config: Config) -> Path | None:
    """What a launch does with the checkpoints before its first step; returns the one it goes on from."""
    list(discard_unfinished(config.run_dir))
    chosen = choose(config)
    step = json.loads((chosen / "trainer.json").read_text())["step"] if chosen else 0
    abandon_newer(config.run_dir, step)
    checkpoint_folders.note_followed(config, chosen, step)
    return chosen


def test_what_others_put_beside_the_checkpoints_stays(run_dir: Path, config: Any) -> None:
    checkpoints = run_dir / "checkpoints"
    mine = ("step_00000014_mine", "step_00000014.tmp_mine", "step_best", "step_000000142", "step_\u0661\u0662345678")
    for name in (*mine, "step_00000012", "step_00000015.tmp"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "work.txt").write_text("a week")
    (checkpoints / "step_notes.txt").write_text("mine")
    (checkpoints / "step_00000013").write_text("mine")
    (checkpoints / "step_00000016.tmp").write_text("mine")
    (checkpoints / "step_00000099").symlink_to("/nowhere")
    archive = write_checkpoint(run_dir.parent / "archive" / "checkpoints" / "step_00000098")
    (checkpoints / "step_00000098").symlink_to(archive)
    before = names(run_dir)
    assert [sentence.split("/")[-1].split(" ")[0] for sentence in sorted(strangers(run_dir))] == sorted(
        [
            *mine,
            "step_00000012",
            "step_notes.txt",
            "step_00000013",
            "step_00000016.tmp",
            "step_00000099",
            "step_00000098",
        ]
    )
    assert begin(config("auto")) == checkpoints / "step_00000009"
    # What was being written goes; a folder of a later step than the run's makes way, unread and whole.
    moved = {"step_00000012", "step_00000015.tmp"}
    assert names(run_dir) == sorted({*before, "step_00000012.abandoned"} - moved)
    assert (checkpoints / "step_00000012.abandoned" / "work.txt").read_text() == "a week"
    assert (archive / "COMPLETE.json").is_file()


def test_a_study_that_discards_checkpoints_leaves_the_rest(run_dir: Path) -> None:
    checkpoints = run_dir / "checkpoints"
    (checkpoints / "step_00000006").rename(checkpoints / "step_00000006.abandoned")
    (checkpoints / "step_00000014_mine").mkdir()
    discard_all(run_dir)
    assert names(run_dir) == ["step_00000014_mine"]
    (checkpoints / "step_00000014_mine").rmdir()
    discard_all(run_dir)
    discard_all(run_dir)
    assert not checkpoints.exists()


def test_an_interrupted_removal_leaves_what_the_next_launch_clears(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(OSError("interrupted")))
        remove(run_dir / "checkpoints" / "step_00000003")
    assert [folder.name for folder in complete_checkpoints(run_dir)] == ["step_00000006", "step_00000009"]
    assert [path.name for path in discard_unfinished(run_dir)] == ["step_00000003.tmp"]
    assert names(run_dir) == ["step_00000006", "step_00000009"]


@pytest.mark.parametrize("name", ["trainer.json", "data_shards.json", "data_rank00000.json", "lm_config.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"[]"])
def test_what_cannot_be_read_is_passed_over(
    run_dir: Path, config: Any, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    path = run_dir / "checkpoints" / "step_00000009" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert begin(config("auto")) == run_dir / "checkpoints" / "step_00000006"
    assert f"step_00000009 is damaged ({name} " in capsys.readouterr().out


def test_where_all_are_damaged_or_of_another_format_the_run_is_refused(run_dir: Path, config: Any) -> None:
    for folder in complete_checkpoints(run_dir):
        (folder / "COMPLETE.json").write_text(json.dumps({"format": 2, "step": 3, "files": {"trainer.json": 9}}))
    with pytest.raises(UserError, match=r"every checkpoint of .*run is damaged.* it is of checkpoint format 2, and"):
        choose(config("auto"))


def test_checkpoints_in_what_is_no_folder(run_dir: Path, config: Any) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    assert choose(config("auto")) is None
    (run_dir / "checkpoints").write_text("")
    with pytest.raises(UserError, match="cannot be read: Not a directory"):
        choose(config("auto"))


def test_a_job_that_is_queued_again_goes_on_from_its_own_newest(
    run_dir: Path, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = run_dir / "checkpoints"
    back = config(checkpoints / "step_00000003")
    assert begin(back) == checkpoints / "step_00000003"
    assert names(run_dir) == ["step_00000003", "step_00000006.abandoned", "step_00000009.abandoned"]
    assert begin(back) == checkpoints / "step_00000003", "killed before it saved anything"
    for step in (4, 5):
        write_checkpoint(checkpoints / f"step_{step:08d}")
    shutil.rmtree(checkpoints / "step_00000003")  # as checkpoint.keep does
    capsys.readouterr()
    assert checkpoint_folders.newest_of_own(back) == checkpoints / "step_00000005"
    assert begin(back) == checkpoints / "step_00000005"
    assert f"train.resume={checkpoints}/step_00000003 was followed by an earlier launch" in capsys.readouterr().out
    (checkpoints / "step_00000005" / "trainer.json").unlink()
    assert begin(back) == checkpoints / "step_00000004"
    assert begin(config(checkpoints / "step_00000004")) == checkpoints / "step_00000004", "another FOLDER is followed"


def test_a_branch_of_another_run_goes_on_as_well(run_dir: Path, config: Any) -> None:
    other = write_checkpoint(run_dir.parent / "other" / "checkpoints" / "step_00000006")
    branch = config(other)
    assert begin(branch) == other, "what the run has is of another history"
    assert "step_00000009.abandoned" in names(run_dir)
    write_checkpoint(run_dir / "checkpoints" / "step_00000008")
    assert begin(branch) == run_dir / "checkpoints" / "step_00000008"


def test_a_run_that_began_anew_follows_a_folder_again(run_dir: Path, config: Any) -> None:
    other = write_checkpoint(run_dir.parent / "other" / "checkpoints" / "step_00000003")
    begin(config(other))
    shutil.rmtree(run_dir / "checkpoints")
    assert begin(config("auto")) is None
    write_checkpoint(run_dir / "checkpoints" / "step_00000006")
    assert begin(config(other)) == other
