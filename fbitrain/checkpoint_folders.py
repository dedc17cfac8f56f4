"""A run's checkpoint folders: which are complete, which one train.resume asks for, which are set aside or removed."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from fbitrain.base.errors import UserError
from fbitrain.checkpoint_files import damage
from fbitrain.config import Config

_NAME = re.compile(r"step_(\d{8})")


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(f for f in folders if _NAME.fullmatch(f.name) and (f / "COMPLETE.json").is_file())


def find_latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(complete_checkpoints(run_dir)), None)


def choose(config: Config) -> Path | None:
    """The checkpoint folder that `train.resume` asks for, checked to be whole; None to start anew.

    Raises UserError for a named checkpoint that is missing, incomplete or damaged. With `auto`, a damaged one is
    reported and the one before it is taken.
    """
    wish = config.train.resume
    if wish == "never":
        if find_latest(config.run_dir):
            raise UserError(
                f"{config.run_dir} already holds checkpoints and train.resume=never would overwrite them; "
                "choose another run.name, remove the folder, or resume with train.resume=auto"
            )
        return None
    if wish != "auto":
        folder = Path(wish)
        if not (folder / "COMPLETE.json").is_file():
            raise UserError(f"train.resume={wish} is not a complete checkpoint: it has no COMPLETE.json")
        if fault := damage(folder):
            raise UserError(f"train.resume={wish} is damaged: {fault}; choose another checkpoint")
        return folder
    found = complete_checkpoints(config.run_dir)
    for folder in reversed(found):
        fault = damage(folder)
        if not fault:
            return folder
        print(f"warning: {folder} is damaged ({fault}); trying the checkpoint before it", flush=True)
    if found:
        raise UserError(f"every checkpoint of {config.run_dir} is damaged; choose another run.name, or remove them")
    return None


def abandon_newer(run_dir: Path, step: int) -> None:
    """Renames the run's checkpoints after `step`: they are of a history that a run from `step` on leaves behind."""
    for folder in complete_checkpoints(run_dir):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.abandoned")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}+")
            folder.rename(aside)
            print(f"renamed {folder} to {aside.name}: this run goes on from step {step}", flush=True)


def discard_unfinished(run_dir: Path) -> Iterable[Path]:
    """Removes what interrupted saves and removals left behind; returns what it removed. Rank 0 only."""
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if not (folder / "COMPLETE.json").is_file() or folder.name.endswith(".tmp"):
            shutil.rmtree(folder)
            yield folder
