"""A run's checkpoint folders: which are complete, which one train.resume asks for, which are set aside or removed.

Only names that fbitrain writes are ever touched: step_00000200, step_00000200.tmp while it is written or removed, and
step_00000200.abandoned, which a run that went back left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fbitrain.base.errors import UserError
from fbitrain.base.files import write_json
from fbitrain.checkpoint_marker import MARKER, damage

if TYPE_CHECKING:
    from fbitrain.config import Config

Look = Callable[[Path], str]  # what is wrong with a checkpoint; empty if nothing
_NAME = re.compile(r"step_[0-9]{8}")
_UNFINISHED = re.compile(r"step_[0-9]{8}\.tmp")
_OURS = re.compile(r"step_[0-9]{8}(\.tmp|\.abandoned\+*)?")
FOLLOWED = "resumed_from.json"  # in the run folder: the checkpoint that a launch with train.resume=FOLDER began with


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def unfinished(final: Path) -> Path:
    """The name that a checkpoint's folder has while it is written or removed."""
    return final.with_name(final.name + ".tmp")


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first; a damaged one is complete, too.

    Raises UserError if the folder that they lie in cannot be read.
    """
    return [folder for folder in _folders(run_dir, _NAME) if _is_complete(folder)]


def find_latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(complete_checkpoints(run_dir)), None)


def _is_complete(folder: Path) -> bool:
    try:
        (folder / MARKER).stat()
    except FileNotFoundError:
        return False
    except OSError:  # it cannot be looked at: whoever looks for damage says so
        return True
    return True


def _folders(run_dir: Path, names: re.Pattern[str]) -> list[Path]:
    """The folders, not links to any, among the run's checkpoints that have one of `names`; sorted."""
    return sorted(
        Path(found)
        for found in _entries(run_dir)
        if names.fullmatch(found.name) and found.is_dir(follow_symlinks=False)
    )


def _entries(run_dir: Path) -> list[os.DirEntry[str]]:
    checkpoints = run_dir / "checkpoints"
    try:
        with os.scandir(checkpoints) as found:
            return list(found)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"the checkpoints in {checkpoints} cannot be read: {error.strerror}; mend that first") from None


def strangers(run_dir: Path) -> Iterator[str]:
    """One sentence for each thing among the checkpoints that looks like one and is not; nothing touches them."""
    for found in _entries(run_dir):
        if not found.name.startswith("step_"):
            continue
        if not _OURS.fullmatch(found.name):
            yield f"{found.path} is left alone: fbitrain writes no such name"
        elif found.is_symlink():
            yield f"{found.path} is left alone: it is a link; to go on from where it leads, name that in train.resume"
        elif not found.is_dir():
            yield f"{found.path} is left alone: it is no folder"
        elif _NAME.fullmatch(found.name) and not _is_complete(Path(found)):
            yield f"{found.path} is left alone: it has no {MARKER}, so it is no complete checkpoint"


def newest_of_own(config: Config) -> Path | None:
    """The newest complete checkpoint that this launch goes on from, damage aside; None if it starts elsewhere or anew.

    With train.resume=FOLDER that is one which an earlier launch from the same FOLDER saved: a job that is queued again
    goes on, it does not begin again.
    """
    return next(reversed(_of_own(config)), None)


def _of_own(config: Config) -> list[Path]:
    wish = config.train.resume
    if wish == "never":
        return []
    found = complete_checkpoints(config.run_dir)
    if wish == "auto":
        return found
    followed, step = _followed(config.run_dir)
    return [folder for folder in found if step_of(folder) > step] if followed == str(Path(wish).resolve()) else []


def _followed(run_dir: Path) -> tuple[str, int]:
    try:
        followed = json.loads((run_dir / FOLLOWED).read_text(encoding="utf-8"))
        return str(followed["folder"]), int(followed["step"])
    except (OSError, ValueError, TypeError, KeyError):
        return "", 0


def note_followed(config: Config, resumed_from: Path | None, step: int) -> None:
    """Notes the FOLDER of train.resume as the one that this run's later checkpoints come from, where it is followed."""
    if resumed_from is None:
        (config.run_dir / FOLLOWED).unlink(missing_ok=True)
    elif config.train.resume != "auto" and resumed_from == Path(config.train.resume):
        write_json(config.run_dir / FOLLOWED, {"folder": str(resumed_from.resolve()), "step": step})


def choose(config: Config, look: Look = damage) -> Path | None:
    """The checkpoint folder that `train.resume` asks for, found whole by `look`; None to start anew.

    Raises UserError for a named checkpoint that is missing, incomplete or damaged. With `auto`, and in the second
    launch with a named one, a damaged one is reported and the one before it is taken.
    """
    wish = config.train.resume
    if wish == "never" and find_latest(config.run_dir):
        raise UserError(
            f"{config.run_dir} already holds checkpoints and train.resume=never would overwrite them; "
            "choose another run.name, remove the folder, or resume with train.resume=auto"
        )
    own = _of_own(config)
    if found := _newest_whole(own, look):
        if wish != "auto":
            print(
                f"train.resume={wish} was followed by an earlier launch, and this one goes on from {found}; "
                "choose another run.name to begin there again",
                flush=True,
            )
        return found
    if wish in ("auto", "never"):
        if own:
            raise UserError(
                f"every checkpoint of {config.run_dir} is damaged, the newest: {look(own[-1])}; "
                "choose another run.name, or remove them"
            )
        return None
    folder = Path(wish)
    if not _is_complete(folder):
        raise UserError(f"train.resume={wish} is not a complete checkpoint: it has no {MARKER}")
    if fault := look(folder):
        raise UserError(f"train.resume={wish} is damaged: {fault}; choose another checkpoint")
    return folder


def _newest_whole(folders: Sequence[Path], look: Look) -> Path | None:
    for folder in reversed(folders):
        fault = look(folder)
        if not fault:
            return folder
        print(f"warning: {folder} is damaged ({fault}); trying the checkpoint before it", flush=True)
    return None


def abandon_newer(run_dir: Path, step: int) -> None:
    """Renames the run's checkpoints after `step`: they are of a history that a run from `step` on leaves behind."""
    for folder in _folders(run_dir, _NAME):
        if step_of(folder) > step:
            print(f"renamed {folder} to {set_aside(folder).name}: this run goes on from step {step}", flush=True)


def set_aside(path: Path) -> Path:
    """Gives whatever has the name `path`, which is needed, another one that is free; returns that."""
    aside = path.with_name(f"{path.name}.abandoned")
    while os.path.lexists(aside):
        aside = aside.with_name(f"{aside.name}+")
    path.rename(aside)
    return aside


def discard_all(run_dir: Path) -> None:
    """Removes every checkpoint of a run, and the folder they lie in unless something else lies there, too."""
    for folder in _folders(run_dir, _OURS):
        shutil.rmtree(folder)
    with suppress(OSError):
        (run_dir / "checkpoints").rmdir()


def discard_unfinished(run_dir: Path) -> Iterator[Path]:
    """Removes what interrupted saves and removals left behind; yields what it removed. Rank 0 only."""
    for folder in _folders(run_dir, _UNFINISHED):
        shutil.rmtree(folder)
        yield folder
