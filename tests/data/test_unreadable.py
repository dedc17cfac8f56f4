"""A file that the system does not give stops the reading; only what is wrong in its content is damage."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.reading.documents import BadRecord
from fbitrain.data.reading.records import RecordFormat, read_entries

SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst"]
ALL_SUFFIXES = [*SUFFIXES, ".parquet"]


def read(path: Path) -> list[Any]:
    return list(read_entries(str(path), RecordFormat()))


def refuse(path: Path, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value) == f"{path} cannot be read ({reason}); restore it or mend its disk, then start again"


@pytest.mark.parametrize("suffix", ALL_SUFFIXES)
def test_a_shard_that_has_vanished(tmp_path: Path, suffix: str) -> None:
    refuse(tmp_path / f"gone{suffix}", "No such file or directory")


@contextmanager
def no_free_descriptor() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("suffix", ALL_SUFFIXES)
def test_too_many_open_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"rubbish")
    if suffix == ".parquet":
        read(path)  # imports pyarrow while there are descriptors for it
    with no_free_descriptor():
        refuse(path, "Too many open files")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_fails_under_a_reader(tmp_path: Path, suffix: str) -> None:
    # Opens like any file; the first read is answered with EIO, because nothing is mapped at address 0.
    (tmp_path / f"a{suffix}").symlink_to("/proc/self/mem")
    refuse(tmp_path / f"a{suffix}", "Input/output error")


@pytest.mark.parametrize("suffix", ALL_SUFFIXES[1:])
def test_rubbish_is_damage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"rubbish")
    (bad,) = read(path)
    assert isinstance(bad, BadRecord)
    assert bad.reason.startswith("the rest of the file is lost: ")
