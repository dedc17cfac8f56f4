"""Names of shards are safe as paths below a folder, and tell the shards of a source apart; whatever their addresses."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbitrain.data.commands.pretokenize import pretokenize
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.sources.names import name_shards
from tests.data import faulty_http as http
from tests.data.conftest import WriteShard


def named(*paths: str) -> dict[str, str]:
    problems: list[str] = []
    names = name_shards(paths, problems)
    assert problems == []
    return names


def test_one_place_needs_no_name_of_its_own() -> None:
    assert named("/d/web/a/1.jsonl", "/d/web/b/1.jsonl") == {
        "a/1.jsonl": "/d/web/a/1.jsonl",
        "b/1.jsonl": "/d/web/b/1.jsonl",
    }
    assert list(named("https://h:80/x/1.jsonl?t=/a", "https://h:80/x/y/2.jsonl")) == ["1.jsonl", "y/2.jsonl"]
    assert list(named("memory:///b/1.jsonl")) == ["1.jsonl"]


def test_several_places_come_first_in_the_names() -> None:
    local = ("/d/web/a/1.jsonl", "/d/web/2.jsonl")
    remote = ("https://me:secret@h:80/x/1.jsonl", "s3://bucket/y/a/1.jsonl", "s3://bucket/y/b/1.jsonl")
    assert named(*local, *remote, "memory:///b/1.jsonl") == {
        "bucket/a/1.jsonl": remote[1],
        "bucket/b/1.jsonl": remote[2],
        "h:80/1.jsonl": remote[0],
        "local/2.jsonl": local[1],
        "local/a/1.jsonl": local[0],
        "memory/1.jsonl": "memory:///b/1.jsonl",
    }


def test_a_local_corpus_may_move_though_a_part_of_it_is_remote() -> None:
    for home in ("/old", "/a/new/home"):
        assert list(named(f"{home}/1.jsonl", "https://h/1.jsonl")) == ["h/1.jsonl", "local/1.jsonl"]


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        (("https://h/a/../1.jsonl", "https://h/b/2.jsonl"), "because of '..'"),
        (("https://h/a/./1.jsonl", "https://h/b/2.jsonl"), "because of '.'"),
        (("https://../1.jsonl", "/d/2.jsonl"), "because of '..'"),
        (("https://h/\0/1.jsonl", "https://h/b/2.jsonl"), r"because of '\x00'"),
        (("https://h/b//1.jsonl", "https://h/b/1.jsonl", "https://h/2.jsonl"), "have the same name 'b/1.jsonl'"),
        (("https://h/1.jsonl", "http://h/1.jsonl"), "have the same name 'h/1.jsonl'"),
        (("https://local/1.jsonl", "/d/1.jsonl"), "have the same name 'local/1.jsonl'"),
        (("https://h/1.jsonl?v=1", "https://h/1.jsonl?v=2"), "have the same name '1.jsonl'"),
    ],
)
def test_what_cannot_be_named_is_a_problem(paths: tuple[str, ...], problem: str) -> None:
    problems: list[str] = []
    name_shards(paths, problems)
    assert len(problems) == 1
    assert problem in problems[0]


parts = st.sampled_from(["a", "b", "..", ".", "", "local", "x.jsonl"])
fronts = st.sampled_from(["/", "https://h/", "https://local/", "http://h/", "s3://a/", "https://../", "memory:///"])


@given(
    st.sets(st.builds(lambda front, below: front + "/".join([*below, "1.jsonl"]), fronts, st.lists(parts)), min_size=1)
)
def test_names_are_relative_and_each_path_has_its_own_or_is_a_problem(paths: set[str]) -> None:
    problems: list[str] = []
    names = name_shards(paths, problems)
    assert len(names) + len(problems) == len(paths)
    assert set(names.values()) <= paths
    assert list(names) == sorted(names)
    for name in names:
        assert not {"", ".", ".."} & set(name.split("/"))
        assert "://" not in name


def test_tokens_of_a_source_in_two_places_are_written_into_their_folder(
    tmp_path: Path, byte_tokenizer: str, write_shard: WriteShard
) -> None:
    write_shard(tmp_path / "corpus" / "1.jsonl", ["here"])
    before = sorted(tmp_path.rglob("*"))
    with http.serving() as server:
        url = server.put("x/1.jsonl", b'{"text": "there"}\n')
        source = SourceConfig(name="web", paths=[str(tmp_path / "corpus"), url])
        data = DataConfig(sources=[source], cache_dir=str(tmp_path / "out" / "cache"))
        reports = pretokenize(data, byte_tokenizer, tmp_path / "out" / "tokens", n_workers=1)
    assert sum(report.n_documents for report in reports["web"]) == 2
    outside = [path for path in sorted(tmp_path.rglob("*")) if tmp_path / "out" not in (path, *path.parents)]
    assert outside == before
    written = {path.relative_to(tmp_path / "out" / "tokens").parts[:2] for path in tmp_path.glob("out/**/*.tokens")}
    assert written == {("web", "local"), ("web", f"127.0.0.1:{url.split(':')[2].split('/')[0]}")}
