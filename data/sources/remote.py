"""Fetching one remote file whole: resumed where that is safe, retried where it makes sense, verified always."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from fbitrain.base.errors import UserError
from fbitrain.data.sources.transport import RemoteError, Stream, Timeouts, list_files, open_stream

LEAST_BYTES_PER_S = 1024

logger = logging.getLogger(__name__)
# Ranks that seed their generators alike must not all come back at the same moment.
_jitter = random.SystemRandom()

T = TypeVar("T")


@dataclass(frozen=True)
class FetchPolicy:
    """How long to wait for a server, and how often to ask it again: with these values for about five minutes."""

    timeouts: Timeouts = field(default_factory=Timeouts)
    attempts: int = 10
    backoff_s: float = 1.0  # after the first failure; doubled after each further one
    max_backoff_s: float = 60.0


DEFAULT_POLICY = FetchPolicy()


@dataclass(frozen=True)
class Fetched:
    """What came."""

    size: int  # bytes
    version: str  # its ETag or date of change; "" where the server gives neither
    retries: int


def fetch(
    url: str,
    file: io.FileIO,
    *,
    size: int = -1,
    sha256: str = "",
    policy: FetchPolicy = DEFAULT_POLICY,
    reserve: Callable[[int], None] = lambda n_bytes: None,
) -> Fetched:
    """Writes `url` to `file` (empty, seekable), which is fsynced when this returns; the caller gives it its name.

    `size` (bytes) and `sha256` (hex) are what the file must have; -1 and "" where nobody knows. `reserve(n)` is called
    before the file grows beyond what was reserved. A broken transfer goes on from its last byte if the server
    can and says, by ETag or Last-Modified and the size, that the file is the same; otherwise from the first.

    Raises UserError for a file that is not there, has changed, cannot be verified, or has not come after
    `policy.attempts`; OSError where `file` cannot be written.
    """
    download = _Download(url, file, size, sha256, policy.timeouts, reserve)
    retries = _retry(download.attempt, f"{url} cannot be fetched", policy)[1]
    file.flush()
    os.fsync(file.fileno())
    return Fetched(download.n_done, download.version, retries)


def fetch_small(url: str, max_bytes: int, policy: FetchPolicy = DEFAULT_POLICY) -> bytes:
    """A small remote file, such as a list of URLs. Raises UserError, also for one that is larger than `max_bytes`."""

    def reserve(n_bytes: int) -> None:
        if n_bytes > max_bytes:
            raise too_large(url, max_bytes)

    memory = io.BytesIO()
    _retry(_Download(url, memory, -1, "", policy.timeouts, reserve).attempt, f"{url} cannot be read", policy)
    return memory.getvalue()


def too_large(path: str, max_bytes: int) -> UserError:
    """What to say of a list that does not end, or is none."""
    return UserError(f"{path} has more than {max_bytes:,} bytes, which no list has; correct data.sources")


def list_remote(pattern: str, *, is_glob: bool, policy: FetchPolicy = DEFAULT_POLICY) -> dict[str, int]:
    """URL -> bytes of the files of a remote folder or glob; empty where there is none. Raises UserError."""

    def work() -> dict[str, int]:
        try:
            return list_files(pattern, is_glob=is_glob)
        except RemoteError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return {}
            raise

    return _retry(work, f"{pattern} cannot be listed", policy)[0]


def _retry(work: Callable[[], T], what: str, policy: FetchPolicy) -> tuple[T, int]:
    """work()'s result and how many attempts failed before. UserError once it cannot help or has been tried enough."""
    for n_failed in range(policy.attempts):
        try:
            return work(), n_failed
        except RemoteError as error:
            if error.final:
                raise UserError(f"{what}: {error}; correct its address in data.sources, or your access to it") from None
            reason = error
        if n_failed + 1 < policy.attempts:
            wait_s = min(policy.backoff_s * 2**n_failed, policy.max_backoff_s) * _jitter.uniform(0.5, 1)
            wait_s = max(wait_s, min(reason.wait_s, policy.max_backoff_s))
            logger.warning("%s: %s; attempt %d follows in %.1f s", what, reason, n_failed + 2, wait_s)
            time.sleep(wait_s)
    raise UserError(
        f"{what} after {policy.attempts} attempts: {reason}; see whether the server is well, then start again"
    )


class _Download:
    """A file on its way; each attempt takes it as far as it gets."""

    def __init__(
        self,
        url: str,
        file: io.FileIO | io.BytesIO,
        size: int,
        sha256: str,
        timeouts: Timeouts,
        reserve: Callable[[int], None],
    ) -> None:
        self.url, self.file, self.size, self.sha256 = url, file, size, sha256.lower()
        self.timeouts, self.reserve = timeouts, reserve
        self.total = -1  # bytes, as the server says
        self.n_reserved = 0
        self.wrong_sha256 = ""
        self._start_anew()

    def _start_anew(self) -> None:
        self.n_done = 0
        self.version = ""
        self.digest = hashlib.sha256()
        self.file.seek(0)

    def attempt(self) -> None:
        """Takes the file to its end, or raises RemoteError."""
        # Without a version nobody can tell that the rest would be of the same file.
        start = self.n_done if self.version and self.total >= 0 else 0
        try:
            stream = open_stream(self.url, start, self.version, self.timeouts)
            try:
                self._begin(stream, start)
                self._read(stream)
                stream.confirm()
            finally:
                stream.close()
            self._verify(stream.ends_itself)
        except RemoteError as error:
            if error.anew:
                self._start_anew()
            raise

    def _read(self, stream: Stream) -> None:
        """Reads to the end. A server that sends next to nothing for `stall_s` seconds counts as silent too."""
        n_bytes, waited_s = 0, 0.0  # of the span that is being watched
        while True:
            asked = time.monotonic()
            chunk = stream.read()
            waited_s += time.monotonic() - asked
            if not chunk:
                return
            self._write(chunk)
            n_bytes += len(chunk)
            if waited_s >= self.timeouts.stall_s:
                if n_bytes < LEAST_BYTES_PER_S * waited_s:
                    raise RemoteError(f"the server has gone all but silent ({n_bytes} bytes in {waited_s:.0f} s)")
                n_bytes, waited_s = 0, 0.0

    def _begin(self, stream: Stream, start: int) -> None:
        if not start or stream.start != start:
            self._start_anew()
        elif stream.total != self.total:
            raise RemoteError(f"the file had {self.total} bytes and has {stream.total}", anew=True)
        self.file.seek(self.n_done)
        self.total, self.version = stream.total, stream.version
        self._require_size(self.total)
        if self.total < 0 and self.size < 0 and not (self.sha256 or stream.ends_itself):
            raise UserError(
                f"{self.url} comes without its length, so that half of it would look whole; "
                "give its sha256 in the source's checksums, or fetch it by hand"
            )
        self._reserve(max(self.total, self.size))

    def _write(self, chunk: bytes) -> None:
        self.n_done += len(chunk)
        self._reserve(self.n_done)
        rest = memoryview(chunk)
        while rest:  # an unbuffered file may take a part of it
            rest = rest[self.file.write(rest) :]
        if self.sha256:
            self.digest.update(chunk)
        if 0 <= self.size < self.n_done:
            self._require_size(self.n_done)

    def _reserve(self, n_bytes: int) -> None:
        if n_bytes > self.n_reserved:
            self.reserve(n_bytes)
            self.n_reserved = n_bytes

    def _verify(self, ends_itself: bool) -> None:
        if self.total >= 0 and self.n_done != self.total:
            raise RemoteError(f"{self.n_done} of {self.total} bytes came", anew=self.n_done > self.total)
        if self.n_done < self.size and not ends_itself:
            raise RemoteError(f"{self.n_done} of {self.size} bytes came")
        self._require_size(self.n_done)
        self._require_sha256()
        self.file.truncate(self.n_done)

    def _require_sha256(self) -> None:
        found = self.digest.hexdigest()
        if self.sha256 in ("", found):
            return
        # Once may be the network's fault; the same twice is what the server has.
        if found == self.wrong_sha256:
            raise UserError(
                f"{self.url} is not the file that the checksums tell of: its sha256 is {found[:12]}… "
                f"and should be {self.sha256[:12]}…; correct the source's checksums or paths"
            )
        self.wrong_sha256 = found
        raise RemoteError("its sha256 is wrong", anew=True)

    def _require_size(self, n_bytes: int) -> None:
        if 0 <= self.size != n_bytes >= 0:
            raise UserError(
                f"{self.url} has changed: it had {self.size} bytes and has {n_bytes}; "
                "restore the file it was, or start a new run"
            )
