"""A checkpoint's writer process with one fault built in, named by $WRITER_FAULT, on the rank $WRITER_RANK."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fbitrain import checkpoint_writer

HERE = Path(__file__).parent
COMMAND = f"import sys; sys.path.insert(0, {str(HERE)!r}); import faulty_writer; faulty_writer.main(sys.argv[1:])"


def hang() -> None:
    time.sleep(600)


def fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise KeyError("a fault of ours")


def in_the_middle_of_the_second_job(act: Callable[[], None]) -> None:
    """When the first tensor of the second checkpoint is written."""
    write, jobs = checkpoint_writer.write_tensors, iter(range(1000))

    def writing(path: Path, tensors: Any, contents: Any) -> None:
        job = next(jobs) if path.name.startswith("shard") else 0

        def content() -> Iterator[Any]:
            for i, chunks in enumerate(contents):
                if job == 1 and i == 1:
                    act()
                yield chunks

        write(path, tensors, content())

    checkpoint_writer.write_tensors = writing  # type: ignore[assignment]


def slow() -> None:
    """Every write takes two seconds."""
    write = checkpoint_writer.write_files

    def writing(*arguments: Any) -> None:
        time.sleep(2)
        write(*arguments)

    checkpoint_writer.write_files = writing


def main(arguments: Sequence[str]) -> None:
    if os.environ.get("RANK", "0") == os.environ.get("WRITER_RANK", "0"):
        fault = getattr(sys.modules[__name__], os.environ["WRITER_FAULT"])
        slow() if fault is slow else in_the_middle_of_the_second_job(fault)
    checkpoint_writer.main(arguments)
