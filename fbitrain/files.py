"""Writing files so that a crash leaves the old one or the new one, never half of either."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fbitrain.data.files import fsync_file, fsync_folder, replacing, sha256_of

__all__ = [
    "fsync_file",
    "fsync_folder",
    "fsync_tree",
    "lock_folder",
    "read_json_lines",
    "replacing",
    "sha256_of",
    "write_json",
    "write_text",
]

_held: list[IO[str]] = []  # open for as long as the process lives


def write_text(path: Path, text: str) -> None:
    """Replaces `path` by a file holding `text` (UTF-8), on disk before it gets its name."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Replaces `path` by `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file with one per line, but for lines cut short when their writer was killed."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def lock_folder(path: Path) -> bool:
    """Holds `path` for this process until it ends, however it ends; False if another process holds it."""
    handle = (path / ".lock").open("w")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return False
    _held.append(handle)
    return True


def fsync_tree(path: Path, only: str = "") -> None:
    """Fsyncs every file below `path` whose name starts with `only`, then the folders."""
    for found in sorted(path.rglob("*"), reverse=True):
        if found.is_dir() or found.name.startswith(only):
            fsync_file(found)
    fsync_folder(path)
