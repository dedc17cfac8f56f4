"""Pretokenized shards give the very blocks that their text gives, and say so when they are damaged."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fbitrain.base.errors import UserError
from fbitrain.data.commands.pretokenize import pretokenize
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.pretokenized import token_shards
from fbitrain.data.pretokenized.token_shards import TokenIndex, TokenUnit
from fbitrain.data.reading.blocks import RecordUnit
from fbitrain.data.reading.documents import START, BadRecord, BlockLimits, BlockSource, Document, Position
from fbitrain.data.sources.shards import Shard, find_shards
from fbitrain.data.streaming.plan import record_format
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer

SUFFIXES = ("jsonl", "jsonl.gz", "jsonl.zst")
property_test = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

documents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
lines = st.one_of(
    documents.map(lambda text: json.dumps({"text": text}).encode()),
    documents.map(lambda text: json.dumps({"text": text, "meta": {}}, ensure_ascii=False).encode()),
    st.sampled_from(
        [
            b"",
            b"  ",
            b"{",
            b'{"text": ""}',
            b'{"text": 3}',
            b'{"no": 1}',
            b'{"text": "\xff\xfe a"}',
            b'{"text": "\\ud800"}',
        ]
    ),
)


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: str) -> Tokenizer:
    return load_tokenizer(byte_tokenizer)


def write(path: Path, content: bytes, cut_off: int) -> Path:
    """The lines of a shard, of whose file the last `cut_off` bytes are missing."""
    packed = {"jsonl": bytes, "gz": gzip.compress, "zst": zstandard.compress}[path.name.rpartition(".")[2]](content)
    path.write_bytes(packed[: len(packed) - min(cut_off, len(packed))])
    return path


def configuration(tmp: Path, source: SourceConfig, **fields: Any) -> DataConfig:
    return DataConfig(sources=[source], cache_dir=str(tmp / "cache"), **fields)


def comparable(item: Document | BadRecord, tokenizer: Tokenizer) -> tuple[Any, ...]:
    if isinstance(item, BadRecord):
        return item.path, item.line, item.reason
    ids = tokenizer.encode(item.text) if item.token_ids is None else item.token_ids.tolist()
    return ids, item.content_hash, item.n_bytes, item.n_replaced, item.bordered


def contents(unit: BlockSource, start: Position, tokenizer: Tokenizer) -> Iterator[tuple[Any, ...]]:
    """Everything that can be asked of the blocks from `start` on."""
    for block in unit.blocks(start):
        if isinstance(block, BadRecord):
            yield comparable(block, tokenizer)
        else:
            found = [(block.line(i), comparable(block[i], tokenizer)) for i in range(len(block))]
            yield block.start, block.after, found


def borders(unit: BlockSource) -> list[Position]:
    return [START, *(block.after for block in unit.blocks(START) if not isinstance(block, BadRecord))]


def require_same_blocks(
    tokens_path: str, path: Path, source: SourceConfig, part: int, n_parts: int, limits: BlockLimits, like: Tokenizer
) -> None:
    text = RecordUnit(str(path), str(path), record_format(source), part, n_parts, limits)
    tokens = TokenUnit(tokens_path, part, n_parts, limits)
    for start in borders(text):
        assert list(contents(tokens, start, like)) == list(contents(text, start, like))


@property_test
@given(
    records=st.lists(lines, max_size=30),
    ends_with_newline=st.booleans(),
    cut_off=st.sampled_from([0, 0, 1, 7, 30]),
    suffix=st.sampled_from(SUFFIXES),
    n_parts=st.integers(1, 4),
    limits=st.builds(BlockLimits, st.integers(1, 12), st.integers(1, 200)),
)
def test_tokens_give_the_blocks_of_the_text(
    records: list[bytes],
    ends_with_newline: bool,
    cut_off: int,
    suffix: str,
    n_parts: int,
    limits: BlockLimits,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tmp = tmp_path_factory.mktemp("corpus")
    path = write(tmp / f"a.{suffix}", b"\n".join(records) + b"\n" * ends_with_newline, cut_off)
    source = SourceConfig("s", [str(path)])
    pretokenize(configuration(tmp, source), tokenizer.path, tmp / "out", n_workers=1)
    (shard,) = TokenIndex(tmp / "out").shards("s")
    assert (shard.name, shard.size) == (path.name, path.stat().st_size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "CHUNK_RECORDS", 5)  # so that blocks lie across chunks
        for part in range(n_parts):
            require_same_blocks(shard.path, path, source, part, n_parts, limits, tokenizer)


def test_rows_of_a_table_and_ready_made_ids_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    table = pa.table({"content": ["one", None, "", "four \U0001f469\u200d\U0001f52c", "five"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    rows = [{"ids": [1, 255, 3]}, {"ids": []}, {"ids": [5]}, {"ids": ["x"]}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        SourceConfig("table", [str(tmp_path / "a.parquet")], text_key="content"),
        SourceConfig("ids", [str(tmp_path / "b.jsonl")], kind="token_ids", ids_key="ids"),
    ]
    pretokenize(DataConfig(sources=sources), tokenizer.path, tmp_path / "out", n_workers=1)
    index = TokenIndex(tmp_path / "out")
    for source in sources:
        (shard,) = index.shards(source.name)
        for part in range(2):
            require_same_blocks(shard.path, Path(source.paths[0]), source, part, 2, BlockLimits(2), tokenizer)
    assert [report.n_documents for report in (*index.sources["table"], *index.sources["ids"])] == [3, 2]


def test_a_large_vocabulary_takes_four_bytes_per_token(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "w1 w69999 w65536"}))
    data = DataConfig(sources=[SourceConfig("s", [str(tmp_path / "a.jsonl")])])
    pretokenize(data, str(tmp_path / "tokenizer.json"), tmp_path / "out", n_workers=1)
    (shard,) = TokenIndex(tmp_path / "out").shards("s")
    (block,) = TokenUnit(shard.path, 0, 1, BlockLimits(10)).blocks(START)
    assert not isinstance(block, BadRecord)
    assert comparable(block[0], load_tokenizer(tmp_path / "tokenizer.json"))[0] == [1, 69999, 65536]
    assert Path(shard.path).stat().st_size == 12


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Source "a/../b" of one shard with two documents, in `out`."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    data = DataConfig(sources=[SourceConfig("a/../b", [str(tmp_path / "a.jsonl")])])
    pretokenize(data, tokenizer.path, tmp_path / "out", n_workers=1)
    return tmp_path / "out"


def test_the_folder_is_laid_out_as_documented(folder: Path, tokenizer: Tokenizer) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    name = "a%2F%2E%2E%2Fb/a.jsonl"
    assert files == {"index.json", "settings.json", *(f"{name}{ending}" for ending in (".tokens", ".records", ".json"))}
    assert np.fromfile(folder / f"{name}.tokens", "<u2").tolist() == tokenizer.encode("onetwo")
    assert len(np.fromfile(folder / f"{name}.records", token_shards.RECORD)) == 2


def damaged(folder: Path, ending: str) -> Path:
    (path,) = folder.rglob(f"*.jsonl{ending}")
    path.write_bytes(path.read_bytes()[:-1])
    return path


@pytest.mark.parametrize("ending", [".tokens", ".records"])
def test_a_file_of_another_size_is_named(folder: Path, ending: str) -> None:
    (shard,) = TokenIndex(folder).shards("a/../b")
    path = damaged(folder, ending)
    message = rf"{path} has \d+ bytes where \d+ were written; run `fbitrain data pretokenize` again"
    with pytest.raises(UserError, match=message):
        TokenIndex(folder).shards("a/../b")
    with pytest.raises(UserError, match=message):
        TokenUnit(shard.path, 0, 1, BlockLimits(1))
    path.unlink()
    with pytest.raises(UserError, match=f"{path} is missing"):
        TokenIndex(folder).shards("a/../b")


def test_a_shard_without_its_report_is_not_believed(folder: Path) -> None:
    (shard,) = TokenIndex(folder).shards("a/../b")
    path = damaged(folder, ".json")
    with pytest.raises(UserError, match=f"{path} is missing or damaged; run"):
        TokenUnit(shard.path, 0, 1, BlockLimits(1))


def test_what_is_not_in_the_folder_is_named(folder: Path, tokenizer: Tokenizer) -> None:
    index = TokenIndex(folder)
    index.require_tokenizer(tokenizer.fingerprint)
    with pytest.raises(UserError, match="was made with another tokenizer"):
        index.require_tokenizer("another")
    with pytest.raises(UserError, match=r"source 'c' is not in .*, which holds 'a/\.\./b'"):
        index.shards("c")


def test_an_index_is_of_the_sources_shards_and_field_or_refused(folder: Path) -> None:
    source = SourceConfig("a/../b", [str(folder.parent / "a.jsonl")])
    index = TokenIndex(folder)
    shards = find_shards(source)
    assert index.originals(source.name) == source.paths
    index.require_source(source, shards)
    with pytest.raises(UserError, match="as text from field 'text', and the configuration says text from field 'body'"):
        index.require_source(replace(source, text_key="body"), None)
    with pytest.raises(UserError, match="the configuration says token_ids from field 'text'"):
        index.require_source(replace(source, kind="token_ids", ids_key="text"), None)
    more = [*shards, Shard("/b.jsonl", "b.jsonl", 1), Shard("/c.jsonl", "c.jsonl", 1)]
    with pytest.raises(UserError, match=r"b.jsonl \(and 1 more\) of source 'a/../b' is not in .*; run"):
        index.require_source(source, more)
    index.require_source(source, None)
    with pytest.raises(UserError, match=r"a.jsonl of source 'a/../b' was tokenized in .* and is no shard of it now"):
        index.require_source(source, [])


def test_a_folder_that_is_not_finished_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished pretokenized shards"):
        TokenIndex(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(UserError, match="is of version 99"):
        TokenIndex(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match=r"index.json cannot be read"):
        TokenIndex(folder)
