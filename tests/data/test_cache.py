"""Shards fetched once, kept while there is room, and right whenever they are there."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.sources.cache import OpenShard, ShardCache
from fbitrain.data.sources.cache_folder import key_of
from fbitrain.data.sources.remote import FetchPolicy
from fbitrain.data.sources.shards import Shard
from fbitrain.data.sources.transport import Timeouts
from tests.data import faulty_http as http

MB = 1_000_000
CONTENT = random.Random(0).randbytes(MB)
QUICK = FetchPolicy(Timeouts(connect_s=2.0, stall_s=0.5), attempts=3, backoff_s=0.01)


@pytest.fixture
def server() -> Iterator[http.FaultyServer]:
    with http.serving() as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "shards"


def cache_in(folder: Path, max_bytes: int = 100 * MB, patience_s: float = 0.0) -> ShardCache:
    return ShardCache(str(folder), max_bytes, policy=QUICK, patience_s=patience_s)


def put(server: http.FaultyServer, name: str, fault: http.Fault | None = None, n_bytes: int = MB) -> Shard:
    return Shard(server.put(name, CONTENT[:n_bytes], fault), name, -1)


def read(opened: OpenShard) -> bytes:
    with opened:
        return Path(opened.path).read_bytes()


def shards_in(folder: Path) -> list[str]:
    """The names, without the hash, of what is there under a final name; parts may not be left."""
    assert not list(folder.glob("*.part"))
    return sorted(path.name.partition("-")[2] for path in folder.glob("????????????????-*[!k]"))


def wait_until(there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_shard_is_fetched_once_and_keeps_its_suffix(server: http.FaultyServer, folder: Path) -> None:
    shard = put(server, "a.jsonl.zst", http.first(1, http.half))
    cache = cache_in(folder)
    assert read(cache.open(shard)) == read(cache.open(shard)) == CONTENT
    assert Path(cache.open(shard).path).name.endswith("-a.jsonl.zst")
    assert read(cache_in(folder).open(shard)) == CONTENT  # as another run
    assert server.requests["a.jsonl.zst"] == 2
    assert cache.counters() == {"fetched_files": 1, "fetched_bytes": MB, "retries": 1, "evicted_files": 0}


def test_a_local_shard_is_opened_as_itself(folder: Path) -> None:
    with cache_in(folder).open(Shard("/data/a.jsonl", "a.jsonl", 5)) as opened:
        assert opened.path == "/data/a.jsonl"
    assert not folder.exists()


def test_urls_with_the_same_end_are_different_shards(server: http.FaultyServer, folder: Path) -> None:
    long = "x" * 300 + ".jsonl"
    shards = [
        put(server, name, n_bytes=n) for n, name in enumerate(["a/1.jsonl", "b/1.jsonl", f"a/{long}", f"b/{long}"])
    ]
    cache = cache_in(folder)
    assert [len(read(cache.open(shard))) for shard in shards] == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT + b"x", None])
def test_a_damaged_shard_is_fetched_again(server: http.FaultyServer, folder: Path, damage: bytes | None) -> None:
    shard = put(server, "a.jsonl")
    path = Path(cache_in(folder).open(shard).path)
    if damage is None:
        (record,) = folder.glob("*a.jsonl.lock")
        record.write_text(record.read_text()[:-3])
    else:
        path.write_bytes(damage)
    assert read(cache_in(folder).open(shard)) == CONTENT
    assert server.requests["a.jsonl"] == 2


def test_a_damaged_shard_that_cannot_be_fetched_again_is_not_there(server: http.FaultyServer, folder: Path) -> None:
    shard = put(server, "a.jsonl")
    Path(cache_in(folder).open(shard).path).write_bytes(b"")
    server.faults["a.jsonl"] = http.status(404)
    for _ in range(2):
        with pytest.raises(UserError, match="no such file"):
            cache_in(folder).open(shard)
    assert shards_in(folder) == []


def test_the_size_in_the_plan_decides(server: http.FaultyServer, folder: Path) -> None:
    shard = put(server, "a.jsonl")
    cache_in(folder).open(shard).close()
    server.put("a.jsonl", CONTENT[:5])
    assert read(cache_in(folder).open(shard)) == CONTENT  # nobody knows better
    assert read(cache_in(folder).open(Shard(shard.path, "a.jsonl", 5))) == CONTENT[:5]
    with pytest.raises(UserError, match="has changed: it had 1000000 bytes and has 5"):
        cache_in(folder).open(Shard(shard.path, "a.jsonl", MB))


@pytest.mark.parametrize("fault", [http.half, http.reset, http.stall(1.0), http.without_length, http.status(503)])
def test_nothing_unverified_gets_a_name(server: http.FaultyServer, folder: Path, fault: http.Fault) -> None:
    shard = put(server, "a.jsonl", fault)
    with pytest.raises(UserError, match=r"a\.jsonl"):
        cache_in(folder).open(shard)
    assert shards_in(folder) == []
    with pytest.raises(UserError, match="sha256"):
        cache_in(folder).open(Shard(put(server, "b.jsonl").path, "b.jsonl", MB, sha256="0" * 64))
    assert shards_in(folder) == []


def test_the_least_recently_used_goes(server: http.FaultyServer, folder: Path) -> None:
    cache = cache_in(folder, max_bytes=3 * MB)
    shards = {name: put(server, f"{name}.jsonl") for name in "abcde"}
    for name in "abcad":
        cache.open(shards[name]).close()
        time.sleep(0.02)  # file systems count in ticks
    assert shards_in(folder) == ["a.jsonl", "c.jsonl", "d.jsonl"]
    assert cache.counters()["evicted_files"] == 1
    assert len(list(folder.glob("*.lock"))) == 4  # one per shard and one for room


def test_what_is_open_stays(server: http.FaultyServer, folder: Path) -> None:
    cache, other = (cache_in(folder, max_bytes=2 * MB) for _ in range(2))
    a, b, c = (put(server, f"{name}.jsonl") for name in "abc")
    held = cache.open(a)
    other.open(b).close()
    other.open(c).close()
    assert shards_in(folder) == ["a.jsonl", "c.jsonl"]
    also_held = other.open(c)
    with pytest.raises(UserError, match=r"full of shards in use: b\.jsonl needs 1,000,000 bytes and 2,000,000 of 2,0"):
        other.open(b)
    assert read(held) == read(also_held) == CONTENT
    assert read(other.open(b)) == CONTENT


def test_room_is_waited_for(server: http.FaultyServer, folder: Path) -> None:
    cache = cache_in(folder, max_bytes=MB, patience_s=10.0)
    held = cache.open(put(server, "a.jsonl"))
    threading.Timer(0.3, held.close).start()
    assert read(cache.open(put(server, "b.jsonl"))) == CONTENT


def test_a_shard_that_cannot_fit(server: http.FaultyServer, folder: Path) -> None:
    cache = cache_in(folder, max_bytes=MB - 1, patience_s=60.0)
    cache.open(put(server, "a.jsonl", n_bytes=5)).close()
    for fault in (None, http.chunked):
        with pytest.raises(UserError, match=r"1,000,000 bytes and the cache may hold 999,999; raise data\.cache_gb"):
            cache.open(put(server, "b.jsonl", fault))
    assert shards_in(folder) == ["a.jsonl"]


def test_settings_travel_and_nothing_else(folder: Path) -> None:
    cache = cache_in(folder)
    cache.prefetch(Shard("/data/a.jsonl", "a.jsonl", 5))
    copy = pickle.loads(pickle.dumps(cache))
    assert copy.settings == cache.settings
    assert set(copy.counters().values()) == {0}


def test_prefetch(server: http.FaultyServer, folder: Path) -> None:
    cache = cache_in(folder)
    a, b, gone = put(server, "a.jsonl", http.slow), put(server, "b.jsonl"), Shard(server.url("c.jsonl"), "c", -1)
    for shard in (gone, a, b, a):
        cache.prefetch(shard)
    assert read(cache.open(a)) == CONTENT  # waits for the one that is on its way
    wait_until(lambda: cache.counters()["fetched_files"] == 2)
    assert read(cache.open(b)) == CONTENT
    assert server.requests == {"a.jsonl": 1, "b.jsonl": 1, "c.jsonl": 1}


OPEN = """
import sys
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.sources.shards import Shard
folder, url, max_bytes = sys.argv[1:]
cache = ShardCache(folder, int(max_bytes))
opened = cache.open(Shard(url, "shard", -1))
with open(opened.path, "rb") as file:
    print(len(file.read()), cache.counters()["fetched_files"], flush=True)
sys.stdin.read()
"""


class Process:
    """Another process with the shard open, until it is told to end."""

    def __init__(self, folder: Path, shard: Shard, max_bytes: int = 100 * MB) -> None:
        command = [sys.executable, "-c", OPEN, str(folder), shard.path, str(max_bytes)]
        self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def opened(self) -> tuple[int, int]:
        """(bytes read, files fetched), once it has."""
        assert self.popen.stdout is not None
        n_bytes, n_fetched = self.popen.stdout.readline().split()
        return int(n_bytes), int(n_fetched)

    def end(self) -> None:
        self.popen.communicate("", timeout=20)


def test_two_processes_fetch_a_shard_once(server: http.FaultyServer, folder: Path) -> None:
    shard = put(server, "a.jsonl", http.slow)
    processes = [Process(folder, shard) for _ in range(2)]
    assert sorted(process.opened() for process in processes) == [(MB, 0), (MB, 1)]
    # Both have it open: neither this process nor a third may throw it out.
    with pytest.raises(UserError, match="in use"):
        cache_in(folder, max_bytes=MB + 5).open(put(server, "b.jsonl"))
    for process in processes:
        process.end()
    assert server.requests["a.jsonl"] == 1
    assert read(cache_in(folder, max_bytes=MB + 5).open(put(server, "b.jsonl"))) == CONTENT
    assert shards_in(folder) == ["b.jsonl"]


def test_a_process_is_killed_while_it_fetches(server: http.FaultyServer, folder: Path) -> None:
    shard = put(server, "a.jsonl", http.first(1, http.stall(5.0)))
    process = Process(folder, shard)
    wait_until(lambda: [path for path in folder.glob("*.part") if path.stat().st_blocks])
    os.kill(process.popen.pid, signal.SIGKILL)
    process.popen.communicate()
    (left,) = folder.glob("*.part")
    assert not list(folder.glob("*.jsonl"))
    # What it left goes when somebody needs room, or the same shard.
    cache_in(folder).open(put(server, "b.jsonl")).close()
    assert not left.exists()
    assert read(cache_in(folder).open(shard)) == CONTENT
    assert shards_in(folder) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize("place", ["a file", "a folder below a file"])
def test_a_folder_that_cannot_be(server: http.FaultyServer, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / ("" if place == "a file" else "cache")
    with pytest.raises(UserError, match=r"cache folder .*file.* cannot be used .*data\.cache_dir"):
        cache_in(folder).open(put(server, "a.jsonl"))


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775])
def test_a_folder_that_others_can_write_is_not_believed(server: http.FaultyServer, folder: Path, mode: int) -> None:
    shard = put(server, "a.jsonl")
    assert read(cache_in(folder).open(shard)) == CONTENT
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(mode)
    with pytest.raises(UserError, match=rf"{folder} can be written by others \(mode {mode:o}\).*data\.cache_dir"):
        cache_in(folder).open(shard)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["the folder", "a shard", "its record"])
def test_what_belongs_to_another_user_is_not_served(server: http.FaultyServer, folder: Path, what: str) -> None:
    shard = put(server, "a.jsonl")
    read(cache_in(folder).open(shard))
    (planted,) = folder.glob("*-a.jsonl")
    place = {"the folder": folder, "a shard": planted, "its record": Path(f"{planted}.lock")}[what]
    os.chown(place, 12345, -1)
    with pytest.raises(UserError, match=r"belongs to user 12345.*data\.cache_dir"):
        cache_in(folder).open(shard)


@pytest.mark.parametrize("name", ["{}", "{}.part", "{}.lock", "room.lock"])
def test_a_link_is_not_followed(server: http.FaultyServer, folder: Path, tmp_path: Path, name: str) -> None:
    shard = put(server, "a.jsonl")
    target = tmp_path / "target"
    target.write_text("mine")
    folder.mkdir(parents=True, mode=0o700)
    (folder / name.format(key_of(shard.path))).symlink_to(target)
    if name == "{}":
        assert read(cache_in(folder).open(shard)) == CONTENT  # the link is replaced
    else:
        with pytest.raises(UserError, match="cannot be used"):
            cache_in(folder).open(shard)
    assert target.read_text() == "mine"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m,mode=755", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NOT TESTED, a full disk: mounting a tmpfs is not permitted ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("fault", [None, http.chunked], ids=["length known", "length unknown"])
def test_a_full_disk_makes_room(server: http.FaultyServer, small_disk: Path, fault: http.Fault | None) -> None:
    cache = cache_in(small_disk)
    for name in "abc":
        cache.open(put(server, f"{name}.jsonl")).close()
        time.sleep(0.02)
    (small_disk / "somebody_else").write_bytes(bytes(50_000))
    assert read(cache.open(put(server, "d.jsonl", fault))) == CONTENT
    assert shards_in(small_disk) == ["b.jsonl", "c.jsonl", "d.jsonl"]
    assert (small_disk / "somebody_else").exists()


def test_the_disk_fills_up_while_a_shard_comes(server: http.FaultyServer, small_disk: Path) -> None:
    cache = cache_in(small_disk)
    for name in "ab":
        cache.open(put(server, f"{name}.jsonl")).close()
        time.sleep(0.02)

    def fill(handler: http.Handler, content: bytes, n_before: int) -> bool:
        handler.answer(200, content[:1000], Content_Length=str(MB))
        time.sleep(0.1)  # by now the client has looked whether there is room
        (small_disk / "somebody_else").write_bytes(bytes(600_000))
        handler.wfile.write(content[1000:])
        return True

    assert read(cache.open(put(server, "c.jsonl", fill))) == CONTENT
    assert shards_in(small_disk) == ["b.jsonl", "c.jsonl"]
    assert server.requests["c.jsonl"] == 2


def test_a_full_disk_without_room(server: http.FaultyServer, small_disk: Path) -> None:
    cache = cache_in(small_disk)
    a, b, c = (put(server, f"{name}.jsonl") for name in "abc")
    held = [cache.open(shard) for shard in (a, b)]
    (small_disk / "somebody_else").write_bytes(bytes(900_000))
    with pytest.raises(UserError, match=r"disk is full: c\.jsonl needs 1,000,000 bytes and \d+,\d+ are free"):
        cache.open(c)
    assert shards_in(small_disk) == ["a.jsonl", "b.jsonl"]
    assert [read(opened) for opened in held] == [CONTENT, CONTENT]


def test_a_read_only_folder(server: http.FaultyServer, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"cannot be used \(Read-only file system\); set data\.cache_dir"):
        cache_in(small_disk).open(put(server, "a.jsonl"))
