"""The folder of the shard cache: names, locks, and which shards are removed when the folder is full.

An entry KEY has up to three files: KEY, the whole shard; KEY.part, the shard while it is fetched; KEY.lock, which the
fetching process locks and in which it writes what is known of the shard. A process that uses KEY or KEY.part holds a
shared lock on it, a process that removes one an exclusive lock. Locks end with their process, however that ends, so a
file that can be locked is in nobody's use (fbitrain/base/locks.py).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from fbitrain.base import locks
from fbitrain.base.errors import UserError
from fbitrain.base.files import fsync_folder, why_not_ours
from fbitrain.data.sources.patterns import file_part

MAX_TAIL = 80
PART = ".part"
LOCK = ".lock"
ROOM_LOCK = "room.lock"
_ENTRY = re.compile(r"[0-9a-f]{16}-")


@dataclass(frozen=True)
class Record:
    """What a whole shard was when it came."""

    url: str
    size: int  # bytes
    sha256: str = ""  # hex, once it has been verified


@dataclass(frozen=True)
class Room:
    """What making room came to; bytes."""

    n_held: int  # by the cache, what is on its way included
    n_free: int  # on the disk
    n_evicted: int  # shards
    in_cache: bool  # whether there is enough below the cache's limit
    on_disk: bool  # and on the disk


def key_of(url: str) -> str:
    """The name of a URL's file: a hash, and the end of the URL's path for readers and for the suffix."""
    tail = re.sub(r"[^A-Za-z0-9._-]", "_", os.path.basename(file_part(url)))[-MAX_TAIL:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}"


class CacheFolder:
    """Raises OSError where the folder cannot be written, or holds a link or another user's file in place of an entry.

    What others can write is not believed, neither the folder nor what lies in it: a record says which shards have been
    verified.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(os.path.expanduser(folder))

    def path(self, key: str) -> str:
        return os.path.join(self.folder, key)

    def make(self) -> None:
        """Makes the folder, for this user alone, if it is not there. Raises UserError if others can write in it."""
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        if why := why_not_ours(os.stat(self.folder)):
            raise UserError(
                f"the cache folder {self.folder} {why}, who may put shards into it; `chmod -R go-w` it, or set "
                "data.cache_dir to a folder of your own"
            )

    def hold(self, key: str, record: Record | None) -> io.FileIO | None:
        """The whole shard, held until the file is closed; None if it is not here or not as `record` says."""
        if record is None or not os.path.exists(self.path(key)):
            return None
        try:
            file = _locked(self.path(key), fcntl.LOCK_SH, create=False)
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != record.size:
            file.close()
            return None
        os.utime(file.fileno())  # the last use, by which shards are evicted
        return file

    def lock(self, key: str) -> io.FileIO:
        """Waits until nobody else fetches `key`; to be closed."""
        return _locked(self.path(key) + LOCK, fcntl.LOCK_EX)

    def new_part(self, key: str) -> Locked:
        """An empty file for the shard, held; only for who has the lock."""
        file = _locked(self.path(key) + PART, fcntl.LOCK_SH)
        file.truncate(0)
        return file

    def record(self, key: str, url: str) -> Record | None:
        """What is known of the shard; None if nothing, or half of it."""
        try:
            with open(self.path(key) + LOCK, encoding="utf-8", opener=_open_own) as file:
                fields = json.load(file)
            record = Record(fields["url"], fields["size"], fields.get("sha256", ""))
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return record if record.url == url else None

    def write_record(self, lock: io.FileIO, record: Record) -> None:
        """Only for who has the lock. Half a record makes an entry that nobody believes."""
        lock.seek(0)
        lock.truncate(0)
        lock.write(json.dumps(asdict(record)).encode())
        os.fsync(lock.fileno())

    def finish(self, key: str, lock: io.FileIO, part: Locked, record: Record) -> None:
        """Gives the fetched and fsynced part its name. What fails here leaves an entry that nobody believes."""
        self.write_record(lock, record)
        with self._alone():
            part.hold(self.path(key))
            os.replace(self.path(key) + PART, self.path(key))
        fsync_folder(Path(self.folder))

    def discard(self, name: str) -> None:
        """Takes away the name of a part that came to nothing, or of a shard that is not what it should be."""
        with suppress(FileNotFoundError):
            os.unlink(self.path(name))

    def make_room(self, part: io.FileIO, n_bytes: int, max_bytes: int, at_least: int = 0) -> Room:
        """Evicts what was used longest ago until `part` can have `n_bytes`, which it then takes.

        Not what any process holds. `at_least` so many shards go even if there seems to be room.
        """
        with self._alone():
            shards, n_held = self._look()
            status = os.fstat(part.fileno())
            n_held -= status.st_size
            n_missing = n_bytes - 512 * status.st_blocks  # that are not there yet
            n_evicted = 0
            for _, size, name in sorted(shards):
                if n_held + n_bytes <= max_bytes and n_missing <= self.free_bytes() and n_evicted >= at_least:
                    break
                if self._remove_unused(name):
                    self._remove_unused(name + LOCK)
                    n_held -= size
                    n_evicted += 1
            n_free = self.free_bytes()
            room = Room(n_held, n_free, n_evicted, n_held + n_bytes <= max_bytes, n_missing <= n_free)
            if room.in_cache and room.on_disk:
                part.truncate(n_bytes)  # so that others count it
        return room

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def _look(self) -> tuple[list[tuple[float, int, str]], int]:
        """(last use, bytes, name) of each whole shard, and the bytes of everything; leftovers are removed."""
        shards = []
        n_held = 0
        with os.scandir(self.folder) as found:
            entries = [entry for entry in found if _ENTRY.match(entry.name) and not entry.name.endswith(LOCK)]
        for entry in entries:
            if entry.name.endswith(PART) and self._remove_unused(entry.name):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # its owner has just given up
                continue
            n_held += status.st_size
            if not entry.name.endswith(PART):
                shards.append((status.st_mtime, status.st_size, entry.name))
        return shards, n_held

    def _remove_unused(self, name: str) -> bool:
        """Whether the file was there and held by nobody."""
        try:
            file = _locked(self.path(name), fcntl.LOCK_EX | fcntl.LOCK_NB, create=False)
        except (BlockingIOError, FileNotFoundError):
            return False
        with file:
            os.unlink(self.path(name))
        return True

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No two processes count, evict and take room at the same time."""
        with _locked(self.path(ROOM_LOCK), fcntl.LOCK_EX):
            yield


def _open_own(path: str, flags: int) -> int:
    """The descriptor of a file. Raises OSError for a link, and for a file that others own or can write."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    if why := why_not_ours(os.fstat(descriptor)):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, f"{os.path.basename(path)} {why}")
    return descriptor


class Locked(io.FileIO):
    """An open file whose lock goes with it."""

    _beat: locks.Beat | None = None

    def hold(self, path: str, operation: int = fcntl.LOCK_SH) -> None:
        """Locks the file, under the name `path`, instead of as before."""
        before, self._beat = self._beat, locks.lock(self.fileno(), path, operation)
        if before:
            before.release()

    def close(self) -> None:
        super().close()
        if self._beat:
            self._beat.release()
            self._beat = None


def _locked(path: str, operation: int, *, create: bool = True) -> Locked:
    """Opens `path` unbuffered and locks it; the file that has this name once the lock is there."""
    while True:
        # Writable, because NFS gives an exclusive lock to no other; closing releases it.
        descriptor = _open_own(path, os.O_RDWR | (os.O_CREAT if create else 0))
        file = Locked(descriptor, "r+")
        try:
            file.hold(path, operation)
            if os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()
