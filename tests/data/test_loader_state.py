"""States that another run left: refused where the data or its settings are others."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.duplicate_list import write_duplicates
from fbitrain.data.streaming.plan import find_sources
from tests.data.corpora import corpus, rank_loader, take


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"n_lanes": 6}, "n_lanes"), ({"seed": 5}, "seed"), ({"seq_len": 32}, "seq_len"), ({"add_eos": False}, "add_eos")],
)
def test_a_state_of_other_settings_is_refused(data: DataConfig, byte_tokenizer: str, changed: Any, key: str) -> None:
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    with pytest.raises(UserError, match=f"has {key}={getattr(data, key)}, this run has {key}={changed[key]}"):
        rank_loader(dataclasses.replace(data, **changed), byte_tokenizer, states=[state])


def test_a_state_of_other_duplicates_is_refused(data: DataConfig, byte_tokenizer: str, tmp_path: Path) -> None:
    lists = []
    for i, lines in enumerate(([1], [1, 2])):
        lists.append(str(tmp_path / f"{i}.npz"))
        write_duplicates(Path(lists[i]), find_sources(data), [("web", "0.jsonl", np.array(lines))])
    _, state = take(rank_loader(dataclasses.replace(data, duplicates=lists[0]), byte_tokenizer), 1)
    with pytest.raises(UserError, match="has duplicates="):
        rank_loader(dataclasses.replace(data, duplicates=lists[1]), byte_tokenizer, states=[state])


def test_other_tokenizers_sources_and_ranks_are_refused(data: DataConfig, byte_tokenizer: str, tmp_path: Path) -> None:
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    content = (Path(byte_tokenizer) / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("</s>", "<end>"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 256, "eos_token_id": [257]}')
    with pytest.raises(UserError, match="tokenizer="):
        rank_loader(data, str(tmp_path), states=[state])
    with pytest.raises(UserError, match="sources are code, web, this run's are web"):
        rank_loader(dataclasses.replace(data, sources=data.sources[:1]), byte_tokenizer, states=[state])
    with pytest.raises(UserError, match="give the state of every rank"):
        rank_loader(data, byte_tokenizer, states=[state, state])
    _, half = take(rank_loader(data, byte_tokenizer, 1, 2), 1)
    with pytest.raises(UserError, match=r"miss lanes \[0, 2, 4\]"):
        rank_loader(data, byte_tokenizer, states=[half])
    with pytest.raises(UserError, match="n_lanes=5 is less than the 6 ranks"):
        rank_loader(data, byte_tokenizer, 0, 6)


def test_changed_shards_are_refused(tmp_path: Path, byte_tokenizer: str, write_shard: Any) -> None:
    data = corpus(tmp_path, write_shard, 9)
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    saved = rank_loader(data, byte_tokenizer).shard_list()
    with open(tmp_path / "web" / "0.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match=r"'web'.*0\.jsonl had \d+ bytes and has \d+"):
        rank_loader(data, byte_tokenizer, states=[state], saved_shards=saved)
    with pytest.raises(UserError, match=r"'web'.*their sizes differ"):
        rank_loader(data, byte_tokenizer, states=[state])


def test_another_kind_of_place_is_another_plan(data: DataConfig, byte_tokenizer: str) -> None:
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    saved = {name: dict.fromkeys(shards, -1) for name, shards in rank_loader(data, byte_tokenizer).shard_list().items()}
    state["fingerprint"]["web"]["sha256"] = "of unknown sizes"
    with pytest.raises(UserError, match=r"the size of 0\.jsonl was not known then and is now"):
        rank_loader(data, byte_tokenizer, states=[state], saved_shards=saved)


def test_other_fields_are_another_stream(data: DataConfig, byte_tokenizer: str) -> None:
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    sources = [dataclasses.replace(data.sources[0], text_key="content"), *data.sources[1:]]
    with pytest.raises(UserError, match=r"'web' was read as text from field 'text' .* reads text from 'content'"):
        rank_loader(dataclasses.replace(data, sources=sources), byte_tokenizer, states=[state])


def test_a_document_that_changed_under_a_stopped_run(tmp_path: Path, byte_tokenizer: str, write_shard: Any) -> None:
    """Of the same size, so only the document that was in use can tell."""
    path = write_shard(tmp_path / "a.jsonl", ["x" * 400] * 5)
    data = DataConfig([SourceConfig("a", [str(tmp_path)])], seq_len=31, n_lanes=1, n_workers=0)
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    path.write_bytes(path.read_bytes().replace(b"x" * 10, b"\\u00e9" + b"xxxx"))
    with pytest.raises(UserError, match=r"a\.jsonl of source 'a' has changed since the run began: the document in use"):
        next(rank_loader(data, byte_tokenizer, states=[state]))
