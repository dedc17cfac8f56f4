"""The shard cache: remote shards as local files, fetched once per node, kept while there is room, never half there."""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import queue
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from fbitrain.base.errors import UserError
from fbitrain.base.files import sha256_of
from fbitrain.data.reading.line_files import unreadable
from fbitrain.data.sources.cache_folder import PART, CacheFolder, Record, Room, key_of
from fbitrain.data.sources.patterns import is_url
from fbitrain.data.sources.remote import DEFAULT_POLICY, Fetched, FetchPolicy, fetch
from fbitrain.data.sources.shards import Shard

logger = logging.getLogger(__name__)

COUNTERS = ("fetched_files", "fetched_bytes", "retries", "evicted_files")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
POLL_S = 1.0


class OpenShard:
    """A shard that can be read under `path` and stays there until it is closed."""

    def __init__(self, path: str, held: io.FileIO | None = None) -> None:
        self.path = path
        self._held = held

    @property
    def n_bytes(self) -> int:
        """Of the file as it is. Raises UserError where that is gone."""
        try:
            return os.path.getsize(self.path)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def close(self) -> None:
        if self._held is not None:
            self._held.close()

    def __enter__(self) -> OpenShard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardCache:
    """A folder of at most `max_bytes` that all processes of a node share; made when the first shard is fetched.

    A shard whose sha256 is known is verified by it once, when it comes or when the sum becomes known, and not each time
    it is opened. What is open in any process stays; the rest goes in the order of its last use. Where everything is
    open and there is no room, `patience_s` seconds may pass before that is an error.
    """

    def __init__(
        self, folder: str, max_bytes: int, *, policy: FetchPolicy = DEFAULT_POLICY, patience_s: float = 60.0
    ) -> None:
        self.settings = (folder, max_bytes, policy, patience_s)
        self._folder = CacheFolder(folder)
        self._max_bytes, self._policy, self._patience_s = max_bytes, policy, patience_s
        self._counters = Counter(dict.fromkeys(COUNTERS, 0))
        self._counting = threading.Lock()
        self._wanted: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[object, ...]:
        folder, max_bytes, policy, patience_s = self.settings
        return functools.partial(ShardCache, policy=policy, patience_s=patience_s), (folder, max_bytes)

    def counters(self) -> dict[str, int]:
        """What this process has done: fetched_files, fetched_bytes, retries, evicted_files."""
        return dict(self._counters)

    def open(self, shard: Shard) -> OpenShard:
        """Blocks until the shard is here, whole and verified. A local shard is opened as itself.

        Raises UserError where it cannot be fetched (remote.fetch), does not fit, or the folder cannot be written or can
        be written by others.
        """
        return self._open(shard, self._patience_s)

    def prefetch(self, shard: Shard) -> None:
        """Fetches the shard behind the caller's back, after those asked for before. Never raises."""
        if not is_url(shard.path):
            return
        self._wanted.put(shard)
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._prefetch_all, name="prefetch", daemon=True)
            self._thread.start()

    def _prefetch_all(self) -> None:
        while True:
            shard = self._wanted.get()
            try:
                self._open(shard, patience_s=0.0).close()
            except Exception as error:
                # Whatever it is, open() will meet it again, where somebody can be told.
                logger.info("prefetch: %s", error)

    def _open(self, shard: Shard, patience_s: float) -> OpenShard:
        if not is_url(shard.path):
            return OpenShard(shard.path)
        key = key_of(shard.path)
        try:
            self._folder.make()
            held = self._hold(key, shard)
            if held is None:
                with self._folder.lock(key) as lock:
                    # Another process may have fetched it while this one waited.
                    held = self._hold(key, shard) or self._verify(key, lock, shard)
                    held = held or self._fetch(key, lock, shard, patience_s)
        except OSError as error:
            raise UserError(
                f"the cache folder {self._folder.folder} cannot be used ({error.strerror or error}); "
                "set data.cache_dir to a folder of your own that can be written"
            ) from None
        return OpenShard(self._folder.path(key), held)

    def _record(self, key: str, shard: Shard) -> Record | None:
        record = self._folder.record(key, shard.path)
        return None if record is None or 0 <= shard.size != record.size else record

    def _hold(self, key: str, shard: Shard) -> io.FileIO | None:
        """The shard if it is here and known to be right."""
        record = self._record(key, shard)
        if record is None or shard.sha256 not in ("", record.sha256):
            return None
        return self._folder.hold(key, record)

    def _verify(self, key: str, lock: io.FileIO, shard: Shard) -> io.FileIO | None:
        """The shard if it came when nobody knew its sum, and has the right one; that is asked once and recorded."""
        record = self._record(key, shard)
        if record is None or record.sha256 or not shard.sha256:
            return None
        held = self._folder.hold(key, record)
        if held is None:
            return None
        if sha256_of(Path(self._folder.path(key))) != shard.sha256:
            logger.warning("%s: the cache holds it with another sha256 than wanted; it is fetched again", shard.path)
            held.close()
            return None
        self._folder.write_record(lock, replace(record, sha256=shard.sha256))
        return held

    def _fetch(self, key: str, lock: io.FileIO, shard: Shard, patience_s: float) -> io.FileIO:
        """The shard, held already when it gets its name, so that nobody can evict it in between."""
        self._folder.discard(key)
        part = self._folder.new_part(key)
        try:
            fetched = self._fetch_into(part, shard, patience_s)
            self._folder.finish(key, lock, part, Record(shard.path, fetched.size, shard.sha256))
        except BaseException:
            part.close()
            self._folder.discard(key + PART)
            raise
        self._count(fetched_files=1, fetched_bytes=fetched.size, retries=fetched.retries)
        return part

    def _fetch_into(self, part: io.FileIO, shard: Shard, patience_s: float) -> Fetched:
        n_needed = 0

        def reserve(n_bytes: int) -> None:
            nonlocal n_needed
            n_needed = n_bytes
            self._reserve(part, shard, n_bytes, patience_s)

        while True:
            try:
                return fetch(
                    shard.path, part, size=shard.size, sha256=shard.sha256, policy=self._policy, reserve=reserve
                )
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
            # The disk was fuller than it said: a quota, or somebody else's file. Something has to go, then once more.
            part.truncate(0)
            room = self._make_room(part, n_needed, at_least=1)
            if not room.n_evicted:
                raise self._no_room(shard, n_needed, room)

    def _reserve(self, part: io.FileIO, shard: Shard, n_bytes: int, patience_s: float) -> None:
        if n_bytes > self._max_bytes:
            raise UserError(
                f"{shard.path} has {n_bytes:,} bytes and the cache may hold {self._max_bytes:,}; raise data.cache_gb"
            )
        deadline = time.monotonic() + patience_s
        while True:
            room = self._make_room(part, n_bytes)
            if room.in_cache and room.on_disk:
                return
            if time.monotonic() >= deadline:
                raise self._no_room(shard, n_bytes, room)
            time.sleep(min(POLL_S, patience_s / 10))

    def _make_room(self, part: io.FileIO, n_bytes: int, at_least: int = 0) -> Room:
        room = self._folder.make_room(part, n_bytes, self._max_bytes, at_least)
        self._count(evicted_files=room.n_evicted)
        return room

    def _count(self, **amounts: int) -> None:
        with self._counting:  # the prefetching thread counts too
            self._counters.update(amounts)

    def _no_room(self, shard: Shard, n_bytes: int, room: Room) -> UserError:
        needed = f"{shard.name} needs {n_bytes:,} bytes"
        if not room.in_cache:
            return UserError(
                f"the cache {self._folder.folder} is full of shards in use: {needed} and {room.n_held:,} of "
                f"{self._max_bytes:,} are taken; raise data.cache_gb, or lower data.n_lanes"
            )
        return UserError(
            f"the disk of the cache {self._folder.folder} is full: {needed} and {room.n_free:,} are free; "
            "make room, or set data.cache_dir to another disk"
        )
