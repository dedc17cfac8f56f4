"""Which files a source is made of, and that nobody exchanges them between two runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbitrain.data.shards import DataError, find_shards, fingerprint, require_same_shards


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))


def names(patterns: list[str]) -> list[str]:
    return [shard.name for shard in find_shards(patterns, "web")]


def test_files_folders_and_globs_each_file_once_sorted(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "b.jsonl.zst",
        "a/2.jsonl.gz",
        "a/1.jsonl",
        "a/deep/er/3.jsonl",
        "a/notes.md",
        "a/.hidden.jsonl",
        "a/4.zst",
    )
    assert names([str(tmp_path)]) == ["a/1.jsonl", "a/2.jsonl.gz", "a/deep/er/3.jsonl", "b.jsonl.zst"]
    assert names([f"{tmp_path}/a/*"]) == ["1.jsonl", "2.jsonl.gz", "deep/er/3.jsonl"]
    assert names([f"{tmp_path}/**/*.jsonl", str(tmp_path / "a"), f"{tmp_path}/a/1.jsonl"]) == [
        "1.jsonl",
        "2.jsonl.gz",
        "deep/er/3.jsonl",
    ]


def test_relative_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "d/1.jsonl")
    monkeypatch.chdir(tmp_path)
    assert find_shards(["d"], "web")[0].path == str(tmp_path / "d/1.jsonl")


@pytest.mark.parametrize("pattern", ["nothing.jsonl", "empty", "*.jsonl", "other/*"])
def test_a_pattern_without_shards_is_named(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path, "other/readme.md", "there/1.jsonl")
    with pytest.raises(DataError, match="source 'web'") as caught:
        find_shards([str(tmp_path / "there"), str(tmp_path / pattern)], "web")
    assert pattern in str(caught.value)


def test_a_file_of_another_kind_is_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet.* is not a shard"):
        find_shards([str(tmp_path / "a.parquet")], "web")


def test_fingerprint_ignores_where_the_corpus_lies(tmp_path: Path) -> None:
    for home in ("old", "new/place"):
        touch(tmp_path / home, "x/1.jsonl", "y/1.jsonl")
    old, new = (fingerprint(find_shards([str(tmp_path / home)], "web")) for home in ("old", "new/place"))
    assert old == new == {"x/1.jsonl": 9, "y/1.jsonl": 9}
    require_same_shards("web", old, new)


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"1": 5}, "2 has vanished"),
        ({"1": 5, "2": 6, "3": 7}, "3 has appeared"),
        ({"1": 5, "2": 7}, "2 had 6 bytes and has 7"),
        ({"9": 5}, r"1 has vanished \(and 2 more differ\)"),
    ],
)
def test_changed_shards_are_named(now: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=f"'web'.*{message}"):
        require_same_shards("web", {"1": 5, "2": 6}, now)
