"""What a path stands for when links, other encodings and unreadable folders are about."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.config import SourceConfig
from fbitrain.data.sources.shards import find_files, find_shards


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * len(name))


def names(*paths: str | Path) -> list[str]:
    return [shard.name for shard in find_shards(SourceConfig(name="web", paths=[str(path) for path in paths]))]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files below two folders."""
    touch(tmp_path / "corpus", "a/1.jsonl", "a/deep/2.jsonl", "b/3.jsonl")
    return tmp_path / "corpus"


ALL = ["a/1.jsonl", "a/deep/2.jsonl", "b/3.jsonl"]
PATTERNS = ["", "/**", "/*", "/**/*.jsonl", "/**/**/*", "/**/deep/*", "/**/[ab]"]


def test_globs_are_those_of_python_where_there_are_no_links(corpus: Path) -> None:
    for pattern, wanted in zip(PATTERNS, [ALL] * 5 + [["2.jsonl"], ALL], strict=True):
        assert names(f"{corpus}{pattern}") == wanted
    touch(corpus, "a/[x]/4.jsonl", ".hidden/5.jsonl", "a/.hidden/6.jsonl")
    assert names(f"{corpus}/**/*.jsonl") == [*ALL[:1], "a/[x]/4.jsonl", *ALL[1:]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_loops_of_links_multiply_nothing(corpus: Path, pattern: str) -> None:
    wanted = names(f"{corpus}{pattern}")
    # A walk that followed these would go on until the system refuses a path of 40 links: for 3**40 folders.
    for link, target in (("again", "."), ("a/up", ".."), ("b/parent", corpus.parent)):
        (corpus / link).symlink_to(target)
    assert names(f"{corpus}{pattern}") == wanted


def test_two_links_to_one_folder(corpus: Path, tmp_path: Path) -> None:
    touch(tmp_path, "elsewhere/4.jsonl")
    for name in ("y", "x"):
        (corpus / name).symlink_to(tmp_path / "elsewhere")
    (corpus / "0").symlink_to("a")
    # A folder is called as it is called without links, or else as by the first link.
    assert names(corpus) == [*ALL, "x/4.jsonl"]
    assert names(f"{corpus}/*") == [*ALL, "x/4.jsonl"]
    assert names(corpus / "0", corpus / "y") == ["0/1.jsonl", "0/deep/2.jsonl", "y/4.jsonl"]


def test_two_paths_of_one_file_are_read_once_and_told(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    (corpus / "0.jsonl").symlink_to("a/1.jsonl")
    (corpus / "a" / "0.jsonl").symlink_to("1.jsonl")
    assert names(corpus) == ALL
    told = f"{corpus}/0.jsonl, {corpus}/a/0.jsonl: links to files that are read under another path, and passed over"
    assert caplog.messages == [told]
    assert names(corpus / "0.jsonl", corpus / "b") == ["0.jsonl", "b/3.jsonl"]
    (corpus.parent / "link").symlink_to(corpus)
    assert [shard.path for shard in find_files([str(corpus), str(corpus.parent / "link")], "heldout")] == [
        str(corpus / name) for name in ALL
    ]


def test_copies_and_hard_links_are_files_of_their_own(corpus: Path) -> None:
    os.link(corpus / "b/3.jsonl", corpus / "b/4.jsonl")
    assert names(corpus / "b") == ["3.jsonl", "4.jsonl"]


def test_a_name_that_is_not_utf8_is_refused(corpus: Path) -> None:
    file = os.fsencode(corpus) + b"/b/\xff.jsonl"
    os.close(os.open(file, os.O_CREAT))
    for pattern in (corpus, f"{corpus}/*/*", os.fsdecode(file)):
        with pytest.raises(UserError, match=r"/b/\\xff\.jsonl' has a name that is not UTF-8; rename it") as caught:
            names(pattern)
        assert str(caught.value).encode()
    os.rename(file, os.fsencode(corpus) + b"/b/\xff.md")
    assert names(corpus) == ALL


def test_a_folder_that_cannot_be_listed_is_no_empty_one(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def without_b(path: Any) -> Iterator[os.DirEntry[str]]:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_b)
    with pytest.raises(UserError, match=r"/b cannot be read \(Permission denied\); mend or remove it"):
        names(corpus)


@pytest.mark.parametrize("pattern", ["{}", "{}/p.jsonl", "{}/*", "{}/**/*.jsonl"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, pattern: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    os.mkfifo(tmp_path / "p.jsonl")
    os.mkfifo(tmp_path / "p.other")
    with pytest.raises(UserError, match=r"p\.jsonl is no file but a pipe"):
        find_files([pattern.format(tmp_path)], "text")
    assert len(find_files([f"{tmp_path}/a*"], "text")) == 1


@pytest.mark.parametrize("pattern", ["train/*.jsonl", "tra?n", "./**/*.jsonl", "../exp [lr=1e-3]/train", "~/train/*"])
def test_no_character_of_the_working_or_home_folder_is_a_wildcard(
    tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("exp [lr=1e-3]", "exp l"):  # what the first one's name stands for as a pattern
        (tmp_path / folder / "train").mkdir(parents=True)
        (tmp_path / folder / "train" / "a.jsonl").write_text("{}\n")
    here = tmp_path / "exp [lr=1e-3]"
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(here))
    assert [shard.path for shard in find_files([pattern], "text")] == [str(here / "train" / "a.jsonl")]
