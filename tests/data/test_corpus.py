"""Commands that read the corpus tell of bad records, and stop where a source has too many or nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.commands.duplicates import find_duplicates
from fbitrain.data.commands.holdout import gather_heldout
from fbitrain.data.config import DataConfig, SourceConfig

Command = Callable[[DataConfig, Path], object]


def holdout(data: DataConfig, folder: Path) -> object:
    return gather_heldout(data, 100, 1_000_000)


def duplicates(data: DataConfig, folder: Path) -> object:
    return find_duplicates(data, folder / "d.npz", memory_mb=16, n_workers=1)


def duplicates_by_two(data: DataConfig, folder: Path) -> object:
    return find_duplicates(data, folder / "d.npz", memory_mb=16, n_workers=2)


commands = pytest.mark.parametrize("command", [holdout, duplicates, duplicates_by_two])


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two sources in two shards each of 20 documents and one broken line; every second document is held out."""
    for source in ("arxiv", "book"):
        (tmp_path / source).mkdir()
        for i in range(2):
            lines = [json.dumps({"text": f"{source} {i} {n}"}) for n in range(20)]
            (tmp_path / source / f"{i}.jsonl").write_text("\n".join([*lines, "{broken"]))
    sources = [SourceConfig(name=name, paths=[str(tmp_path / name)]) for name in ("arxiv", "book")]
    return DataConfig(sources=sources, heldout_fraction=0.5)


def with_key(data: DataConfig, text_key: str) -> DataConfig:
    """The second source with another text_key."""
    return replace(data, sources=[data.sources[0], replace(data.sources[1], text_key=text_key)])


@commands
def test_bad_records_are_told_per_source(
    data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, command: Command
) -> None:
    command(data, tmp_path)
    for source, message in zip(("arxiv", "book"), caplog.messages, strict=True):
        told = f"source {source!r}: bad records passed over: 2, the last one in {tmp_path}/{source}/"
        assert message.startswith(told)
        assert ".jsonl, line 21: not JSON" in message


@commands
def test_a_source_of_bad_records_alone_is_an_error(data: DataConfig, tmp_path: Path, command: Command) -> None:
    with pytest.raises(UserError) as caught:
        command(with_key(data, "content"), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"source 'book' gave nothing but bad records (42), the last one in {tmp_path}/book/")
    assert message.endswith("; correct its text_key or ids_key, or its paths")
    assert not (tmp_path / "d.npz").exists()


@commands
@pytest.mark.parametrize(("text_key", "limit", "source"), [("content", 30, "book"), ("text", 1, "arxiv")])
def test_too_many_bad_records_are_an_error(
    data: DataConfig, tmp_path: Path, command: Command, text_key: str, limit: int, source: str
) -> None:
    data = replace(with_key(data, text_key), max_bad_records=limit)
    with pytest.raises(UserError, match=f"source {source!r} has more than data.max_bad_records={limit} bad records"):
        command(data, tmp_path)
    assert not (tmp_path / "d.npz").exists()


@commands
def test_an_empty_shard_is_no_bad_record(tmp_path: Path, command: Command) -> None:
    for name, text in (("full", '{"text": "one"}\n{"text": "two"}'), ("empty", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jsonl").write_text(text)
    sources = [SourceConfig(name=name, paths=[str(tmp_path / name)]) for name in ("empty", "full")]
    assert command(DataConfig(sources=sources, heldout_fraction=0.99), tmp_path)
