"""A file comes whole and right, or an error says why not; whatever the server does."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import io
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub.constants
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations

from fbitrain.base.errors import UserError
from fbitrain.data.sources.remote import Fetched, FetchPolicy, fetch, fetch_small, list_remote
from fbitrain.data.sources.transport import RemoteError, Timeouts, within
from tests.data import faulty_http as http

CONTENT = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = FetchPolicy(Timeouts(connect_s=0.5, stall_s=0.2), attempts=4, backoff_s=0.01)


@pytest.fixture
def server() -> Iterator[http.FaultyServer]:
    with http.serving() as running:
        yield running


def get(url: str, path: Path, **known: Any) -> tuple[bytes, Fetched]:
    """The bytes of the file that a fetch left, which may not take long."""
    started = time.monotonic()
    try:
        with io.FileIO(path, "w+") as file:
            fetched = fetch(url, file, policy=QUICK, **known)
    finally:
        assert time.monotonic() - started < 10
    assert fetched.size == path.stat().st_size
    return path.read_bytes(), fetched


FAULTS = {
    "none": (None, 1),
    "half, twice": (http.first(2, http.half), 3),
    "reset": (http.first(1, http.reset), 2),
    "stall": (http.first(1, http.stall(0.6)), 2),
    "slow": (http.slow, 1),
    "503 twice": (http.first(2, http.status(503)), 3),
    "429": (http.first(1, http.status(429, Retry_After="0")), 2),
    "length is a word": (http.first(1, http.status(200, Content_Length="many")), 2),
    "length is negative": (http.first(1, http.status(200, Content_Length="-5")), 2),
    "no version": (http.unversioned, 2),
    "chunked, broken off": (http.chunked, 2),
    "ranges ignored": (http.without_ranges, 2),
    "another range": (http.wrong_range, 3),
    "416": (http.unsatisfiable, 3),
    "redirect": (http.redirect, 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_comes_whole(server: http.FaultyServer, tmp_path: Path, name: str) -> None:
    fault, n_requests = FAULTS[name]
    url = server.put("a.jsonl", CONTENT, fault)
    content, fetched = get(url, tmp_path / "a")
    assert content == CONTENT
    assert (server.requests["a.jsonl"], fetched.retries) == (n_requests, n_requests - 1)


def test_a_broken_transfer_goes_on_where_it_broke(server: http.FaultyServer, tmp_path: Path) -> None:
    url = server.put("a.jsonl", CONTENT, http.first(2, http.half))
    get(url, tmp_path / "a", sha256=SHA256)
    assert server.ranges == ["", "bytes=150000-", "bytes=225000-"]


@pytest.mark.parametrize("fault", [http.half, http.unversioned], ids=["with a version", "without"])
def test_the_file_changes_between_two_attempts(server: http.FaultyServer, tmp_path: Path, fault: http.Fault) -> None:
    other = CONTENT[::-1]

    def change(handler: http.Handler, content: bytes, n_before: int) -> bool:
        server.files["a.jsonl"] = other
        return n_before == 0 and fault(handler, content, n_before)

    url = server.put("a.jsonl", CONTENT, change)
    assert get(url, tmp_path / "a")[0] == other  # nothing of the first half


PERMANENT = {
    "404": (http.status(404), r"no such file"),
    "403": (http.status(403), r"403.*your access"),
    "redirects in a circle": (http.circle, r"cannot be fetched"),
    "no length": (http.without_length, r"without its length.*checksums"),
    "compressed on the way": (http.status(200, Content_Encoding="br"), r"Content-Encoding br"),
}


@pytest.mark.parametrize("name", PERMANENT)
def test_what_asking_again_cannot_mend(server: http.FaultyServer, tmp_path: Path, name: str) -> None:
    fault, message = PERMANENT[name]
    url = server.put("a.jsonl", CONTENT, fault)
    with pytest.raises(UserError, match=message) as caught:
        get(url, tmp_path / "a")
    assert url in str(caught.value)
    if name != "redirects in a circle":
        assert server.requests["a.jsonl"] == 1


@pytest.mark.parametrize(
    ("fault", "reason"), [(http.status(503), "503"), (http.stall(0.6), "silent"), (http.half, "attempts")]
)
def test_attempts_end(server: http.FaultyServer, tmp_path: Path, fault: http.Fault, reason: str) -> None:
    url = server.put("a.jsonl", CONTENT, fault)
    with pytest.raises(UserError, match=rf"after 4 attempts: .*{reason}|{reason}.*see whether the server"):
        get(url, tmp_path / "a")
    assert server.requests["a.jsonl"] == QUICK.attempts


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="after 4 attempts"):
        get("http://127.0.0.1:9/a.jsonl", tmp_path / "a")


def test_what_is_known_is_checked(server: http.FaultyServer, tmp_path: Path) -> None:
    url = server.put("a.jsonl", CONTENT)
    assert get(url, tmp_path / "a", size=len(CONTENT), sha256=SHA256.upper())[0] == CONTENT
    with pytest.raises(UserError, match="has changed: it had 7 bytes and has 300000"):
        get(url, tmp_path / "a", size=7)
    with pytest.raises(UserError, match=r"its sha256 is .* and should be 0000"):
        get(url, tmp_path / "a", sha256="0" * 64)
    assert server.requests["a.jsonl"] == 4  # damage on the way would not have come twice


@pytest.mark.parametrize("known", [{"size": len(CONTENT)}, {"sha256": SHA256}], ids=["size", "sha256"])
def test_half_a_file_of_unknown_length_is_told_by_what_is_known(
    server: http.FaultyServer, tmp_path: Path, known: dict[str, Any]
) -> None:
    url = server.put("a.jsonl", CONTENT, http.first(1, http.without_length))
    assert get(url, tmp_path / "a", **known)[0] == CONTENT
    assert server.requests["a.jsonl"] == 2


def test_damage_on_the_way_is_mended(server: http.FaultyServer, tmp_path: Path) -> None:
    def flip(handler: http.Handler, content: bytes, n_before: int) -> bool:
        handler.serve(content[:-1] + bytes([content[-1] ^ 1]))
        return True

    url = server.put("a.jsonl", CONTENT, http.first(1, flip))
    assert get(url, tmp_path / "a", sha256=SHA256)[0] == CONTENT


def test_room_is_reserved_before_the_first_byte(server: http.FaultyServer, tmp_path: Path) -> None:
    asked: list[int] = []
    get(server.put("a.jsonl", CONTENT, http.first(1, http.half)), tmp_path / "a", reserve=asked.append)
    assert asked == [len(CONTENT)]
    get(server.put("b.jsonl", CONTENT, http.chunked), tmp_path / "b", reserve=asked.append)
    assert asked[-1] == len(CONTENT)


def test_a_stored_gzip_stays_as_it_is_stored(server: http.FaultyServer, tmp_path: Path) -> None:
    def labelled(handler: http.Handler, content: bytes, n_before: int) -> bool:
        handler.answer(200, content, Content_Encoding="gzip")
        return True

    assert get(server.put("a.jsonl.gz", CONTENT, labelled), tmp_path / "a")[0] == CONTENT


def test_text(server: http.FaultyServer) -> None:
    url = server.put("urls.txt", "ä\n".encode(), http.first(1, http.status(500)))
    assert fetch_small(url, 3, QUICK).decode() == "ä\n"
    with pytest.raises(UserError, match=r"urls.txt has more than 3 bytes, which no list has"):
        fetch_small(server.put("urls.txt", b"1234"), 3, QUICK)


def trickle(handler: http.Handler, content: bytes, n_before: int) -> bool:
    """A byte now and then, which is never silence."""
    handler.answer(200, b"", Content_Length=str(len(content)))
    with contextlib.suppress(OSError):
        for i in range(len(content)):
            handler.wfile.write(content[i : i + 1])
            handler.wfile.flush()
            time.sleep(0.05)
    handler.close_connection = True
    return True


def test_a_server_that_sends_a_byte_now_and_then_counts_as_silent(server: http.FaultyServer, tmp_path: Path) -> None:
    url = server.put("a.jsonl", CONTENT, http.first(1, trickle))
    assert get(url, tmp_path / "a")[0] == CONTENT
    assert server.requests["a.jsonl"] == 2
    server.put("a.jsonl", CONTENT, trickle)
    with pytest.raises(UserError, match=r"after 4 attempts: the server has gone all but silent \(\d+ bytes"):
        get(url, tmp_path / "a")


def test_a_text_that_never_ends_is_left(server: http.FaultyServer) -> None:
    def endless(handler: http.Handler, content: bytes, n_before: int) -> bool:
        handler.answer(200, b"", Content_Length="", Transfer_Encoding="chunked")
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        handler.close_connection = True
        return True

    with pytest.raises(UserError, match="has more than 100,000 bytes"):
        fetch_small(server.put("urls.txt", CONTENT, endless), 100_000, QUICK)


class FlakyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """flaky:// breaks when told to."""

    protocol = "flaky"
    store: dict[str, Any] = {}  # noqa: RUF012  (as its base class has it)
    pseudo_dirs = [""]  # noqa: RUF012
    faults: list[str] = []  # noqa: RUF012  (of the following reads)
    offsets: list[int] = []  # noqa: RUF012  (at which files were opened)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("flaky://")))

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        file = io.BytesIO(super()._open(path, mode, **options).getvalue()) if mode == "rb" else None
        return FlakyFile(self, file) if file is not None else super()._open(path, mode, **options)


class FlakyFile:
    def __init__(self, file_system: FlakyFileSystem, file: io.BytesIO) -> None:
        self.file_system, self.file = file_system, file
        self.close = file.close

    def seek(self, offset: int) -> None:
        self.file_system.offsets.append(offset)
        self.file.seek(offset)

    def read(self, n_bytes: int) -> bytes:
        fault = self.file_system.faults.pop(0) if self.file_system.faults else ""
        if fault == "hang":
            time.sleep(0.5)
        if fault == "break":
            raise ConnectionResetError("gone")
        if fault == "change":
            self.file_system.pipe("/b/a.jsonl", CONTENT[::-1])
        return self.file.read(100_000)


@pytest.fixture
def flaky() -> Iterator[type[FlakyFileSystem]]:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem().pipe("/b/a.jsonl", CONTENT)
    FlakyFileSystem.offsets = []
    yield FlakyFileSystem
    FlakyFileSystem.store.clear()


@pytest.mark.parametrize("fault", ["hang", "break"])
def test_other_file_systems_resume(flaky: type[FlakyFileSystem], tmp_path: Path, fault: str) -> None:
    flaky.faults = ["", fault, "", fault]
    content, fetched = get("flaky://b/a.jsonl", tmp_path / "a", sha256=SHA256)
    assert (content, fetched.retries, flaky.offsets) == (CONTENT, 2, [0, 100_000, 200_000])
    assert datetime.datetime.fromisoformat(fetched.version)


def test_a_change_under_a_reader_is_noticed(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    flaky.faults = ["", "change"]
    content, fetched = get("flaky://b/a.jsonl", tmp_path / "a")
    assert (content, fetched.retries) == (CONTENT[::-1], 1)


def test_listing(flaky: type[FlakyFileSystem], tmp_path: Path) -> None:
    flaky().pipe("/b/sub/b.jsonl", b"12345")
    assert list_remote("flaky://b", is_glob=False) == {"flaky:///b/a.jsonl": 300_000, "flaky:///b/sub/b.jsonl": 5}
    assert list_remote("flaky://b/s*", is_glob=True) == {"flaky:///b/sub/b.jsonl": 5}
    assert list_remote("flaky://nothing", is_glob=False) == {}
    with pytest.raises(UserError, match="no such file"):
        get("flaky://b/c.jsonl", tmp_path / "a")


def test_the_hub(server: http.FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = server.url("{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url("").rstrip("/"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    files = [{"type": "file", "path": "arxiv/1.jsonl", "size": len(CONTENT), "oid": "0"}]
    server.put("api/datasets/o/d", json.dumps({"id": "o/d", "sha": "0", "siblings": []}).encode())
    server.put("api/datasets/o/d/tree/main/arxiv", json.dumps(files).encode())
    server.put("datasets/o/d/resolve/main/arxiv/1.jsonl", CONTENT, http.first(1, http.half))
    assert list_remote("hf://datasets/o/d/arxiv", is_glob=False) == {"hf://datasets/o/d/arxiv/1.jsonl": len(CONTENT)}
    server.ranges.clear()
    content, fetched = get("hf://datasets/o/d/arxiv/1.jsonl", tmp_path / "a", sha256=SHA256)
    assert (content, fetched.retries) == (CONTENT, 1)
    assert [wanted for wanted in server.ranges if wanted] == ["bytes=150000-"]
    assert server.tokens["datasets/o/d/resolve/main/arxiv/1.jsonl"] == "Bearer hf_secret"


def test_missing_packages_and_unknown_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = {"class": "not_installed.S3FileSystem", "err": "Install s3fs to access S3"}
    monkeypatch.setitem(known_implementations, "s3a", absent)
    with pytest.raises(UserError, match="s3a:// needs a package that is not installed; pip install s3fs"):
        get("s3a://b/a.jsonl", tmp_path / "a")
    with pytest.raises(UserError, match="unknown protocol"):
        get("htps://b/a.jsonl", tmp_path / "a")


def test_work_that_hangs_is_left_behind() -> None:
    never = threading.Event()
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"no answer for 0\.1 s"):
        within(0.1, never.wait)
    assert time.monotonic() - started < 5
    never.set()
