"""Writing files so that a crash leaves the old one or the new one, never half of either; and folders for one alone."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fbitrain.base.errors import UserError
from fbitrain.base.locks import lock

_held: list[IO[str]] = []  # open for as long as the process lives


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which is fsynced and renamed to `path`; on an error, removed."""
    # A name that nobody can foresee: a link of that name would lead the writer to another's file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def naming_unwritable(path: Path) -> Iterator[None]:
    """Turns an OSError of what is done inside into a UserError: `path` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); name another place") from None


def write_anywhere(path: Path, content: bytes) -> None:
    """Replaces `path` by a file holding `content`, and makes the folders on the way to it. Raises UserError."""
    with naming_unwritable(path):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, which takes its name when all in it is on disk; on an error, removed."""
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        building.mkdir(parents=True)
        yield building
        fsync_tree(building)
        if path.exists():
            shutil.rmtree(path)
        building.replace(path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def require_writable(path: Path, option: str, *, makes_folders: bool = False) -> None:
    """Raises UserError if the file `path`, which `option` names, cannot be written; asked before the work it is for.

    makes_folders: folders on the way to it that are missing are no reason, as the caller makes them.
    """
    folder = path.absolute().parent
    while makes_folders and not folder.exists():
        folder = folder.parent
    if path.is_dir():
        why = "it is a folder"
    elif not folder.is_dir():
        why = f"{folder} is no folder" if folder.exists() else f"there is no folder {folder}"
    elif not os.access(folder, os.W_OK | os.X_OK):
        why = f"{folder} is not yours to write to"
    else:
        return
    raise UserError(f"{option} {path} cannot be written: {why}; name another file")


def give_usual_mode(path: Path) -> None:
    """Gives a file that safetensors wrote, readable by its owner alone, the mode of any new file: what umask leaves."""
    probe = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")  # os.umask would change it for other threads
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        path.chmod(stat.S_IMODE(os.fstat(descriptor).st_mode))
    finally:
        os.close(descriptor)
        probe.unlink()


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
    """Holds `path` for this process until it ends, however it ends; False if another process holds it.

    Where the file system has no flock, it may take as long to find out as a dead process's lock stays (locks.STALE_S).
    """
    handle = os.fdopen(os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
    try:
        lock(handle.fileno(), path / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB, patient=True)
    except BlockingIOError:
        handle.close()
        return False
    _held.append(handle)
    return True


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields `path` as an empty folder for this process alone, removed in the end; what a killed run left goes first.

    Raises UserError if another process is using it.
    """
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise UserError(f"{path} is a link, and what it leads to would be cleared; remove it")
    with claimed_folder(path, os.O_NOFOLLOW):
        _clear(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def claimed_folder(path: Path, flags: int = 0) -> Iterator[None]:
    """Holds the folder `path`, opened with `flags`, for this process alone. UserError if another process holds it."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | flags)
    beat = None
    try:
        try:
            beat = lock(handle, path, fcntl.LOCK_EX | fcntl.LOCK_NB, patient=True)
        except BlockingIOError:
            what = f"{path} is in use by another run of this command"
            raise UserError(f"{what}; wait for it, or write elsewhere") from None
        yield
    finally:
        os.close(handle)
        if beat:
            beat.release()


def why_not_ours(status: os.stat_result) -> str:
    """Why others than this user and root may have written what has this status; empty if none can have."""
    if status.st_uid not in (0, os.geteuid()):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by others (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def _clear(folder: Path) -> None:
    for found in folder.iterdir():
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink()


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read a megabyte at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_file(path: Path) -> None:
    """Puts a file's bytes on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable, as fsync_file does for a file's bytes."""
    fsync_file(path)


def fsync_tree(path: Path, only: str = "") -> None:
    """Fsyncs every file below `path` whose name starts with `only`, then the folders."""
    for found in sorted(path.rglob("*"), reverse=True):
        if found.is_dir() or found.name.startswith(only):
            fsync_file(found)
    fsync_folder(path)
