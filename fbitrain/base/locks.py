"""Locks on files and folders that end with their process: flock, and a heartbeat where the file system has none.

Some network file systems are mounted without flock. There the holder writes a file beside what is locked, with its
machine and process, and touches it every BEAT_S seconds. A holder whose process is gone from this machine, or that
has not touched its file for STALE_S seconds, holds nothing: a dead node's lock blocks nobody for longer.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import json
import os
import random
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fbitrain.base.processes import machine, started

BEAT_S = 10.0
STALE_S = 60.0
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def lock(descriptor: int, path: Path | str, operation: int, *, patient: bool = False) -> Beat | None:
    """flock(descriptor, operation) on what lies at `path`; where that is impossible, a Beat, which is to be released.

    With LOCK_NB it raises BlockingIOError where another holds the lock; `patient`: once a Beat was seen to go on.
    """
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        return _take(Path(path), operation, patient)
    return None


class Beat:
    """A lock that is held: a file that is touched until it is released, or the process ends."""

    def __init__(self, file: Path) -> None:
        """Raises FileExistsError if the file is there."""
        self.file = file
        self._token = secrets.token_hex(8)
        owner = {"machine": machine(), "pid": os.getpid(), "started": started(os.getpid()), "token": self._token}
        with file.open("x", encoding="utf-8") as out:
            out.write(json.dumps(owner))

    def touch(self) -> bool:
        """Whether this is still the holder: another may have taken over from a process that was stopped for long."""
        try:
            if _owner(self.file).get("token") != self._token:
                return False
            os.utime(self.file)
        except FileNotFoundError:
            return False
        except OSError:  # a file system that is away for a while
            return True
        return True

    def release(self) -> None:
        _beating.remove(self)
        with suppress(OSError):
            if _owner(self.file).get("token") == self._token:
                self.file.unlink()


class _Beating(threading.Thread):
    """Touches the files of all locks that this process holds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._held: list[Beat] = []
        self._own = threading.Lock()
        self._pid = os.getpid()

    def add(self, beat: Beat) -> None:
        with self._own:
            self._held.append(beat)
            if self.ident is None:
                self.start()
                atexit.register(self.release_all)

    def remove(self, beat: Beat) -> None:
        with self._own, suppress(ValueError):
            self._held.remove(beat)

    def release_all(self) -> None:
        for beat in list(self._held) if os.getpid() == self._pid else ():
            beat.release()

    def run(self) -> None:
        while True:
            time.sleep(BEAT_S)
            for beat in list(self._held):
                if not beat.touch() and beat in self._held:
                    self.remove(beat)
                    print(f"warning: the lock {beat.file} was lost to another process", flush=True)


_beating = _Beating()


def _take(path: Path, operation: int, patient: bool) -> Beat:
    alone = path.with_name(f".{path.name.lstrip('.')}.beat")
    exclusive = bool(operation & fcntl.LOCK_EX)
    seen: dict[Path, float] = {}
    while True:
        # Each kind says first that it is there and then looks for the other, so that never both go on.
        mine = _announce(alone if exclusive else alone.with_name(f"{alone.name}.{secrets.token_hex(8)}"))
        others = list(_holders(_shared(alone) if exclusive and mine else [alone]))
        if mine and not others:
            _beating.add(mine)
            return mine
        if mine:
            mine.release()
        elif not others:  # it was a dead owner's
            continue
        if operation & fcntl.LOCK_NB and not (patient and all(_may_be_dead(file, seen) for file in others)):
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
        time.sleep(random.uniform(0.5, 1.5) * min(0.5, BEAT_S))


def _announce(file: Path) -> Beat | None:
    try:
        return Beat(file)
    except FileExistsError:
        return None


def _shared(alone: Path) -> list[Path]:
    return [file for file in alone.parent.iterdir() if file.name.startswith(f"{alone.name}.")]


def _holders(files: Sequence[Path]) -> Iterator[Path]:
    """Those of `files` whose processes are not known to be gone; the others are removed."""
    for file in files:
        try:
            owner, age = _owner(file), _age(file)
        except FileNotFoundError:
            continue
        here = owner.get("machine") == machine()
        if started(int(str(owner["pid"]))) == owner["started"] if here else age <= STALE_S:
            yield file
        else:
            _remove(file, owner)


def _may_be_dead(file: Path, seen: dict[Path, float]) -> bool:
    """Whether the file of a process on another machine was not touched between two looks."""
    try:
        touched = file.stat().st_mtime
        elsewhere = _owner(file).get("machine") != machine()
    except FileNotFoundError:
        return True
    return elsewhere and seen.setdefault(file, touched) == touched


def _owner(file: Path) -> dict[str, object]:
    """What the holder wrote; empty while it writes. Raises FileNotFoundError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _age(file: Path) -> float:
    """Seconds since the file was touched, by the clock of the file system, which need not be this machine's."""
    probe = file.with_name(f".{secrets.token_hex(8)}.tmp")
    with probe.open("x") as new, file.open() as old:  # opened: what a network disk remembers of it may be too old
        probe.unlink()
        return os.fstat(new.fileno()).st_mtime - os.fstat(old.fileno()).st_mtime


def _remove(file: Path, owner: dict[str, object]) -> None:
    """Takes a dead owner's file away; one that another process has put in its place meanwhile goes back."""
    aside = file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return
    if _owner(aside) != owner:
        with suppress(OSError):
            os.link(aside, file)
    aside.unlink()
