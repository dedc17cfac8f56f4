"""Copies of run folders, to go on from in another way."""

from __future__ import annotations

import shutil
from pathlib import Path


def copy_run(run_dir: Path, copy: Path, step: int | None = None) -> Path:
    """Copies a run as it was after `step` steps; None: as it is. Returns the copy."""
    shutil.copytree(run_dir, copy)
    for saved in copy.glob("checkpoints/step_*"):
        if step is not None and saved.name > f"step_{step:08d}":
            shutil.rmtree(saved)
    return copy
