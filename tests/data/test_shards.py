"""Which files a source is made of: patterns, URLs and lists to shards, and every mistake named."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from fbitrain.base.errors import UserError
from fbitrain.data.config import SourceConfig
from fbitrain.data.sources import shard_lists
from fbitrain.data.sources.shards import Shard, find_files, find_shards
from tests.data import faulty_http as http

REDPAJAMA = "https://data.example/v1.0.0"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))


def find(*paths: str | Path, **fields: Any) -> list[Shard]:
    return find_shards(SourceConfig(name="web", paths=[str(path) for path in paths], **fields))


def names(*paths: str | Path, **fields: Any) -> list[str]:
    return [shard.name for shard in find(*paths, **fields)]


@pytest.fixture
def memory() -> Iterator[MemoryFileSystem]:
    file_system = MemoryFileSystem()
    yield file_system
    file_system.store.clear()


def test_files_folders_and_globs_each_file_once_sorted(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *("b.jsonl.zst", "a/2.jsonl.gz", "a/1.jsonl", "a/deep/er/3.jsonl", "a/4.parquet"),
        *("a/notes.md", "a/.hidden.jsonl", "a/4.zst", "a/.git/5.jsonl"),
    )
    below_a = ["1.jsonl", "2.jsonl.gz", "4.parquet", "deep/er/3.jsonl"]
    assert names(tmp_path) == [*(f"a/{name}" for name in below_a), "b.jsonl.zst"]
    assert names(f"{tmp_path}/a/*") == below_a
    assert names(f"{tmp_path}/**/*.jsonl", tmp_path / "a", f"{tmp_path}/a/1.jsonl") == below_a


def test_relative_patterns_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "d/1.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("d") == find("~/d") == [Shard(str(tmp_path / "d/1.jsonl"), "1.jsonl", len("d/1.jsonl"))]


@pytest.mark.parametrize("pattern", ["nothing.jsonl", "empty", "*.jsonl", "other/*", "{1..2}.jsonl"])
def test_a_pattern_without_shards_is_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "other/readme.md", "there/1.jsonl")
    with pytest.raises(UserError, match="source 'web'") as caught:
        find(tmp_path / "there", tmp_path / pattern)
    assert pattern in str(caught.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    touch(tmp_path, "a.csv", "1.jsonl", "sums")
    with pytest.raises(UserError) as caught:
        find(
            *(tmp_path / name for name in ("a.csv", "1.jsonl", "gone.jsonl", "{5..1}.jsonl")),
            "https://h/*.jsonl",
            "https://h/folder/",
            "htps://h/a.jsonl",
            skip=["2.jsonl"],
            url_lists=[str(tmp_path / "urls.txt")],
            checksums=[str(tmp_path / "sums")],
        )
    message = str(caught.value)
    for problem in (
        *("a.csv' is not a shard", "gone.jsonl' matches no", "{5..1} of", "runs backwards"),
        *("https://h/*.jsonl' cannot be listed", "https://h/folder/' cannot be listed", "unknown protocol"),
        *("skip pattern '2.jsonl' matches no shard", "urls.txt' cannot be read", "sums', line 1: 'xxxx' is not"),
    ):
        assert problem in message


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    touch(tmp_path, "1.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"source 'web': the path '{path}' is empty; correct or drop it"):
        find("1.jsonl", path)


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "1.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"1\.jsonl cannot be read"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "first", "last", "n"),
    [
        ("train_{000..359}.jsonl", "train_000.jsonl", "train_359.jsonl", 360),
        ("{8..11}.jsonl", "10.jsonl", "9.jsonl", 4),
        ("{08..11}/{0..1}.jsonl", "08/0.jsonl", "11/1.jsonl", 8),
    ],
)
def test_ranges(tmp_path: Path, pattern: str, first: str, last: str, n: int) -> None:
    remote = names(f"https://h/x/{pattern}")
    assert (remote[0], remote[-1], len(remote)) == (first, last, n)
    touch(tmp_path, *remote)
    assert names(f"{tmp_path}/{pattern}") == remote
    assert {shard.size for shard in find(f"https://h/{pattern}")} == {-1}


def test_what_a_range_lacks_is_counted(tmp_path: Path) -> None:
    touch(tmp_path, "1.jsonl")
    with pytest.raises(UserError, match=r"2\.jsonl, .*3\.jsonl, .*4\.jsonl and 6 more of .*1\.\.10"):
        find(f"{tmp_path}/{{1..10}}.jsonl")
    with pytest.raises(UserError, match="more than 1,000,000 files"):
        find("https://h/{0..9999}/{0..9999}.jsonl")


def test_names_do_not_depend_on_where_the_corpus_lies(tmp_path: Path, memory: MemoryFileSystem) -> None:
    for home in ("old", "new/place"):
        touch(tmp_path / home, "x/1.jsonl", "y/1.jsonl")
    for name in ("x/1.jsonl", "y/1.jsonl"):
        memory.pipe(f"/bucket/{name}", name.encode())
    addresses = (tmp_path / "old", f"{tmp_path}/new/place/*", "https://h/deep/{x,y}", "memory://bucket")
    for address in addresses:
        parts = [str(address).replace("{x,y}", part) for part in ("x/1.jsonl", "y/1.jsonl")]
        assert names(*(parts if "{" in str(address) else [address])) == ["x/1.jsonl", "y/1.jsonl"]


def test_a_url_with_a_query(tmp_path: Path) -> None:
    assert find("https://h/a/1.jsonl?token=a/b*")[0] == Shard("https://h/a/1.jsonl?token=a/b*", "1.jsonl", -1)
    with pytest.raises(UserError, match=r"have the same name '1.jsonl'"):
        find("https://h/a/1.jsonl?v=1", "https://h/a/1.jsonl?v=2")


def test_buckets_are_listed_with_sizes(memory: MemoryFileSystem) -> None:
    for name in ("a/1.jsonl", "a/2.jsonl.zst", "a/b/3.parquet", "a/readme.md", "a/.4.jsonl"):
        memory.pipe(f"/bucket/{name}", name.encode())
    assert names("memory://bucket/a") == ["1.jsonl", "2.jsonl.zst", "b/3.parquet"]
    assert find("memory://bucket/*/*.jsonl") == [Shard("memory:///bucket/a/1.jsonl", "1.jsonl", 9)]
    assert [shard.size for shard in find("memory://bucket/a/b/3.parquet")] == [-1]  # nobody was asked
    with pytest.raises(UserError, match="matches no"):
        find("memory://bucket/none")


LIST = f"""
# RedPajama-Data-1T
{REDPAJAMA}/arxiv/arxiv_1.jsonl
{REDPAJAMA}/arxiv/arxiv_2.jsonl

{REDPAJAMA}/book/book.jsonl
{REDPAJAMA}/common_crawl/2019-30/en_head_0000.json.gz.dedup.classifier.jsonl.zst
{REDPAJAMA}/LICENSE.txt
"""


def test_url_lists(tmp_path: Path) -> None:
    with http.serving() as server:
        url = server.put("urls.txt", LIST.encode(), http.first(1, http.half))
        (tmp_path / "urls.txt").write_text(LIST)
        for path in (str(tmp_path / "urls.txt"), url):
            assert names(url_lists=[path], include=["*/arxiv/*"]) == ["arxiv_1.jsonl", "arxiv_2.jsonl"]
            assert names(url_lists=[path], include=["*/book/*", "*.zst"])[0] == "book/book.jsonl"
        assert dict(server.requests) == {"urls.txt": 2}  # no shard; the list again after a failure
    with pytest.raises(UserError, match=r"LICENSE\.txt in url_lists is not a shard"):
        names(url_lists=[str(tmp_path / "urls.txt")])
    with pytest.raises(UserError, match=r"include pattern '\*/arxif/\*' matches no shard"):
        names(url_lists=[str(tmp_path / "urls.txt")], include=["*/arxif/*", "*/book/*"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", "lists no URL"),
        ("<html> https://a\n", "line 1: '<html>"),
        ("https://a/1.jsonl\n1", "line 2: '1'"),
    ],
)
def test_what_is_no_url_list(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "urls.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        find(url_lists=[str(tmp_path / "urls.txt")])


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/a.jsonl",
        "local:///etc/a.jsonl",
        "memory://b/a.jsonl",
        "FILE:///etc/a.jsonl",
        "zip://a.jsonl::file:///etc/a.jsonl",
        "https://a/b.zip::file:///etc/a.jsonl",
        "reference://a.jsonl",
    ],
)
def test_a_list_from_a_server_names_no_file_of_this_machine(tmp_path: Path, url: str) -> None:
    content = f"https://a/1.jsonl\n{url}\n"
    with http.serving() as server, pytest.raises(UserError, match=r"urls\.txt', line 2: .* is not on a server"):
        find(url_lists=[server.put("urls.txt", content.encode())])


def test_ones_own_list_may_name_files_of_this_machine(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl")
    (tmp_path / "urls.txt").write_text(f"file://{tmp_path}/a.jsonl\n")
    assert names(url_lists=[str(tmp_path / "urls.txt")]) == ["a.jsonl"]
    assert names(url_lists=[f"file://{tmp_path}/urls.txt"]) == ["a.jsonl"]


def test_lists_may_begin_with_a_byte_order_mark_and_must_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = hashlib.sha256(b"1").hexdigest()
    sums, urls = f"\ufeff{one}  1.jsonl\n".encode(), "\ufeff# shards\nhttps://h/1.jsonl\n".encode()
    (tmp_path / "SUMS").write_bytes(sums)
    (tmp_path / "urls.txt").write_bytes(urls)
    with http.serving() as server:
        for where in (f"{tmp_path}/", server.url("")):
            for name, content in (("SUMS", sums), ("urls.txt", urls)):
                server.put(name, content)
            (shard,) = find(url_lists=[f"{where}urls.txt"], checksums=[f"{where}SUMS"])
            assert (shard.name, shard.sha256) == ("1.jsonl", one)
    monkeypatch.setattr(shard_lists, "MAX_LIST_BYTES", 1000)
    with pytest.raises(UserError, match="/dev/zero has more than 1,000 bytes, which no list has"):
        find(url_lists=["/dev/zero"])
    (tmp_path / "latin1").write_bytes(b"\xe4")
    with pytest.raises(UserError, match="it is not UTF-8"):
        find(url_lists=[str(tmp_path / "latin1")])


def test_skip_by_name_pattern_and_url(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{folder}/train_{i:03d}.jsonl" for folder in "ab" for i in (69, 70, 71)))
    left = ["a/train_069.jsonl", "b/train_069.jsonl", "b/train_071.jsonl"]
    assert names(tmp_path, skip=["train_070.jsonl", "a/train_07?.jsonl"]) == left
    assert names(tmp_path, skip=["train_070.jsonl", f"{tmp_path}/a/train_071.jsonl"]) == left
    assert names("https://h/{1..3}.jsonl", skip=["https://h/[12].jsonl"]) == ["3.jsonl"]
    # What is skipped still has a say in the names of the others.
    assert names(tmp_path, skip=["b/*"]) == ["a/train_069.jsonl", "a/train_070.jsonl", "a/train_071.jsonl"]
    with pytest.raises(UserError, match="skip leaves no shard"):
        names(tmp_path, skip=["*"])


def test_checksums(tmp_path: Path) -> None:
    one, two, three = (hashlib.sha256(text).hexdigest() for text in (b"1", b"2", b"3"))
    sums = f"{one}  ./arxiv/1.jsonl\n{two} *1.jsonl\n{three}  rxiv/2.jsonl\n"
    (tmp_path / "SHA256SUMS").write_text(sums)
    found = find("https://h/arxiv/{1..2}.jsonl", "https://h/book/1.jsonl", checksums=[str(tmp_path / "SHA256SUMS")])
    # The longest name that ends the path; a name ends at a folder's border.
    assert [shard.sha256 for shard in found] == [one, "", two]
    with pytest.raises(UserError, match="names none of its shards"):
        find("https://h/3.jsonl", checksums=[str(tmp_path / "SHA256SUMS")])
    (tmp_path / "SHA256SUMS").write_text(sums + f"{one}  rxiv/2.jsonl\n")
    with pytest.raises(UserError, match=r"line 4: rxiv/2\.jsonl has another sum"):
        find("https://h/arxiv/1.jsonl", checksums=[str(tmp_path / "SHA256SUMS")])


def test_shards_without_a_sum_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sums = "".join(f"{hashlib.sha256(b'').hexdigest()}  {i}.jsonl\n" for i in (1, 3))
    (tmp_path / "sums").write_text(sums)
    find("https://h/1.jsonl", "https://h/3.jsonl", checksums=[str(tmp_path / "sums")])
    assert not caplog.messages
    find("https://h/{1..4}.jsonl", checksums=[str(tmp_path / "sums")])
    without = "https://h/2.jsonl, https://h/4.jsonl"
    assert caplog.messages == [f"source 'web': 2 of 4 shards have no sum in its checksums: {without}"]


def test_files_for_other_purposes(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.jsonl", "c.raw", "d.csv")
    assert [shard.name for shard in find_files([str(tmp_path)], "heldout")] == ["a.txt", "b.jsonl", "c.raw"]
    assert [shard.name for shard in find_files([str(tmp_path)], "heldout", (".csv",))] == ["d.csv"]
    with pytest.raises(UserError, match=r"heldout: .*gone"):
        find_files([str(tmp_path / "gone")], "heldout")


def test_ten_thousand_shards_are_found_at_once(tmp_path: Path) -> None:
    for i in range(10_000):
        os.close(os.open(tmp_path / f"{i:05d}.jsonl", os.O_CREAT | os.O_WRONLY))
    sums = "".join(f"{hashlib.sha256(b'').hexdigest()}  {i:05d}.jsonl\n" for i in range(10_000))
    (tmp_path / "sums.txt").write_text(sums)
    started = time.process_time()
    assert len(find(tmp_path, skip=["*7.jsonl"], checksums=[str(tmp_path / "sums.txt")])) == 9_000
    assert len(find("https://h/{00000..09999}.jsonl", skip=["*7.jsonl"])) == 9_000
    assert time.process_time() - started < 2  # of the CPU; about 0.4 s where nothing else runs
