"""What a run ran on: versions, device and commit, written beside its results."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fbitrain

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "tokenizers", "numpy", "omegaconf")


def describe(world_size: int) -> dict[str, Any]:
    """Versions, device, ranks and, in a git checkout, the commit (with `+changes` when files differ from it)."""
    return {
        "fbitrain": fbitrain.__version__,
        "git_commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: installed(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "world_size": world_size,
    }


def installed(package: str) -> str:
    """The version of an installed distribution, or an empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def processor() -> str:
    """The CPU's name as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def git_commit() -> str:
    """The commit of the checkout this code runs from; empty outside one."""
    root = Path(fbitrain.__file__).resolve().parents[1]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
