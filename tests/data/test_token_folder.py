"""What a folder of pretokenized shards takes for the shard that it already holds, and where it writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.pretokenized.token_folder import TokenFolder
from fbitrain.data.pretokenized.token_shards import ShardReport
from fbitrain.data.reading.records import RecordFormat
from fbitrain.data.sources.shards import Shard


@pytest.fixture
def folder(tmp_path: Path) -> TokenFolder:
    return TokenFolder(tmp_path / "out", "fingerprint", "<u2")


@pytest.mark.parametrize("name", ["/etc/a.jsonl", "../a.jsonl", "a/../../b.jsonl", "https://host/a.jsonl", "./a.jsonl"])
def test_nothing_is_written_outside_of_the_folder(folder: TokenFolder, name: str) -> None:
    with pytest.raises(UserError, match="which may lie outside of") as caught:
        folder.target("s", RecordFormat(), Shard("/corpus/a.jsonl", name, 1))
    assert f"/corpus/a.jsonl of source 's' would be written to {name!r}" in str(caught.value)


def test_names_below_the_folder_are_taken_as_they_are(folder: TokenFolder) -> None:
    target = folder.target("s", RecordFormat(), Shard("/corpus/a..b/c.jsonl", "a..b/c.jsonl", 1))
    assert target.path == folder.path / "s" / "a..b" / "c.jsonl"


@pytest.mark.parametrize(("before", "now", "changed"), [(5, 5, ""), (-1, 5, ""), (5, -1, ""), (5, 6, "has changed")])
def test_a_size_that_nobody_asked_for_is_no_change(folder: TokenFolder, before: int, now: int, changed: str) -> None:
    target = folder.target("s", RecordFormat(), Shard("/a.jsonl", "a.jsonl", now))
    report = ShardReport("a.jsonl", before, "/a.jsonl", "text", "text", "<u2")
    assert target.change_since(report)[: len("has changed")] == changed
