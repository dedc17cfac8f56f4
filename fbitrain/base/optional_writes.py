"""What a run writes and can do without: where it cannot be written, that is said once, and the run goes on."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

KEPT_BYTES = 16 * 2**20  # of lines that wait for room on the disk; later ones are left out


class OptionalWrites:
    """Does writes of `what`. The first that fails is said in one sentence, and the first that succeeds after it."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._failing = False

    def __call__(self, write: Callable[[], object]) -> bool:
        """Whether `write()` succeeded, that is, raised no OSError."""
        failed_before = self._failing
        try:
            write()
            self._failing = False
        except OSError as error:
            self._failing = True
            if not failed_before:
                reason = error.strerror or error
                print(f"warning: {self._what} cannot be written: {reason}; the run goes on and tries again", flush=True)
        if failed_before and not self._failing:
            print(f"{self._what} can be written again", flush=True)
        return not self._failing


class JsonLines:
    """A file of one JSON object per line that is added to. Lines for which there is no room wait, and come later.

    Raises OSError if it cannot be opened; from then on no write fails.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        size = os.fstat(self._file).st_size
        # A process that was killed on a full disk leaves half a line, which must not become a part of the next.
        self._waiting = b"\n" if size and os.pread(self._file, 1, size - 1) != b"\n" else b""
        self._writes = OptionalWrites(str(path))

    def add(self, record: Mapping[str, Any]) -> None:
        if len(self._waiting) < KEPT_BYTES:
            self._waiting += json.dumps(record).encode() + b"\n"
        self._writes(self._write)

    def close(self) -> None:
        """Puts what there is room for on disk."""
        self._writes(self._write)
        with suppress(OSError):
            os.fsync(self._file)
        os.close(self._file)

    def _write(self) -> None:
        while self._waiting:  # a disk that fills up takes the first part of a line, and the rest later
            self._waiting = self._waiting[os.write(self._file, self._waiting) :]


class _Lossy(io.FileIO):
    """A descriptor that drops what the disk has no room for."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return memoryview(data).nbytes


def never_fail_to_print() -> None:
    """Lets this process lose what it prints into a log file on a full disk, instead of ending by it."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            with suppress(OSError):
                stream.flush()
            raw = io.BufferedWriter(_Lossy(number, "w", closefd=False))
            lossy = io.TextIOWrapper(
                raw,
                stream.encoding,
                stream.errors,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lossy)
