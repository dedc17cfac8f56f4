"""Documents held out by their content: always the same ones, whatever the corpus looks like."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings

from fbitrain.base.errors import UserError
from fbitrain.commands.verbs import call
from fbitrain.data.commands.holdout import gather_heldout
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.holdout_rule import is_heldout
from fbitrain.data.reading.documents import Document

hashes = st.integers(0, 2**64 - 1)
seeds = st.integers(-(2**70), 2**70)
fractions = st.floats(0, 1, exclude_max=True)


@given(content_hash=hashes, seed=seeds, fraction=fractions, larger=fractions)
def test_a_larger_fraction_holds_out_more_and_none_nothing(
    content_hash: int, seed: int, fraction: float, larger: float
) -> None:
    assert not is_heldout(content_hash, seed, 0.0)
    if is_heldout(content_hash, seed, min(fraction, larger)):
        assert is_heldout(content_hash, seed, max(fraction, larger))


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5])
def test_the_fraction_is_kept_even_of_hashes_in_a_row_and_differs_by_seed(fraction: float) -> None:
    n = 50_000
    held = [np.array([is_heldout(i, seed, fraction) for i in range(n)]) for seed in (0, 1)]
    deviation = (n * fraction * (1 - fraction)) ** 0.5
    assert all(abs(int(mask.sum()) - n * fraction) < 5 * deviation for mask in held)
    both = int((held[0] & held[1]).sum())
    assert abs(both - n * fraction**2) < 5 * (n * fraction**2) ** 0.5 + 1


def test_which_documents_are_held_out_never_changes() -> None:
    # A new version that chose others would train on what an older one measures.
    held = [i for i in range(1000) if is_heldout(Document(f"document {i}").content_hash, seed=7, fraction=0.01)]
    assert held == [45, 81, 213, 366, 451, 475, 593, 606, 620, 779, 897, 913, 972]


def write_shard(path: Path, texts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(texts)}), path)
        return
    raw = "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts).encode()
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(raw))


def config_of(folder: Path, weights: dict[str, float], **fields: Any) -> DataConfig:
    sources = [SourceConfig(name=name, paths=[str(folder / name)], weight=weight) for name, weight in weights.items()]
    return DataConfig(sources=sources, **fields)


TEXTS = [f"document {i} of the corpus" for i in range(40)]


@settings(deadline=None, max_examples=25)
@given(
    order=st.permutations(TEXTS),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"]),
    n_shards=st.integers(1, 5),
    n_copies=st.integers(1, 2),
)
def test_the_same_documents_whatever_order_sharding_and_format(
    tmp_path_factory: pytest.TempPathFactory, order: list[str], suffix: str, n_shards: int, n_copies: int
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(n_shards):
        write_shard(folder / "wiki" / f"{i}{suffix}", (order * n_copies)[i::n_shards])
    documents = gather_heldout(config_of(folder, {"wiki": 1.0}, heldout_fraction=0.3), 1000, 1_000_000)
    held = [text for text in TEXTS if is_heldout(Document(text).content_hash, 0, 0.3)]
    assert 4 < len(held) < 20
    assert sorted(document.text for document in documents) == sorted(held)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three sources in ten shards each of 100 documents of 100 bytes, and a source of ready-made ids."""
    generator = random.Random(0)
    for source in ("arxiv", "book", "c4"):
        for i in range(10):
            texts = [f"{source} {generator.random():.17f}".ljust(100) for _ in range(100)]
            write_shard(tmp_path / source / f"{i}.jsonl", texts)
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "0.jsonl").write_text('{"token_ids": [1, 2, 3]}\n')
    return tmp_path


def test_documents_are_shared_out_by_weight_and_over_shards(corpus: Path) -> None:
    weights = {"arxiv": 1.0, "book": 2.0, "c4": 5.0}
    documents = gather_heldout(config_of(corpus, weights, heldout_fraction=0.5), 80, 1_000_000)
    assert {name: sum(d.source == name for d in documents) for name in weights} == {"arxiv": 10, "book": 20, "c4": 50}
    per_shard = [sum((d.source, d.shard) == ("c4", f"{i}.jsonl") for d in documents) for i in range(10)]
    assert per_shard == [5] * 10
    # Mixed: the first eighth is not of the first source alone.
    assert len({document.source for document in documents[:20]}) == 3


def test_bytes_are_a_limit_too(corpus: Path) -> None:
    data = config_of(corpus, {"arxiv": 1.0, "book": 1.0}, heldout_fraction=0.5)
    assert len(gather_heldout(data, 1000, 5_000)) == 50


def test_what_one_source_lacks_the_next_gives(corpus: Path) -> None:
    write_shard(corpus / "small" / "0.jsonl", ["one", "two"])
    data = config_of(corpus, {"small": 1.0, "c4": 1.0}, heldout_fraction=0.9)
    assert len(gather_heldout(data, 100, 1_000_000)) == 100


def test_the_command_writes_a_shard_that_says_where_its_texts_lie(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = corpus / "config.yaml"
    sources = [{"name": "arxiv", "paths": [str(corpus / "arxiv")]}]
    sources += [{"name": "ids", "paths": [str(corpus / "ids")], "kind": "token_ids"}]
    # The shard to be written may already be named there.
    out = corpus / "heldout.jsonl.zst"
    config.write_text(json.dumps({"data": {"sources": sources, "heldout": [str(out)], "heldout_fraction": 0.1}}))
    assert call(["data", "holdout", str(config), "--out", str(out), "--max-documents", "30"]) == 0
    assert f"data.heldout=[{out}]" in capsys.readouterr().out
    records = [json.loads(line) for line in zstandard.decompress(out.read_bytes()).splitlines()]
    assert len({record["text"] for record in records}) == 30
    for record in records:
        lines = (corpus / record["meta"]["source"] / record["meta"]["shard"]).read_text().splitlines()
        assert json.loads(lines[record["meta"]["line"]])["text"] == record["text"]
        assert is_heldout(Document(record["text"]).content_hash, 0, 0.1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.heldout_fraction=0"], "data.heldout_fraction is 0, so no document is held out; set it"),
        (["data.heldout_fraction=1e-12"], "no document of the sources is held out by data.heldout_fraction=1e-12"),
        (["data.heldout_fraction=2"], "data.heldout_fraction=2.0 must be at least 0 and less than 1"),
    ],
)
def test_errors_are_one_sentence(
    corpus: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    config = corpus / "config.yaml"
    config.write_text(json.dumps({"data": {"sources": [{"name": "c4", "paths": [str(corpus / "c4")]}]}}))
    assert call(["data", "holdout", str(config), "--out", str(corpus / "heldout.jsonl.zst"), *overrides]) == 1
    assert message in capsys.readouterr().err
    assert not (corpus / "heldout.jsonl.zst").exists()


def test_a_corpus_of_ids_alone_has_no_text_to_hold_out(corpus: Path) -> None:
    ids = SourceConfig(name="ids", paths=[str(corpus / "ids")], kind="token_ids")
    with pytest.raises(UserError, match="no document of the sources is held out"):
        gather_heldout(DataConfig(sources=[ids], heldout_fraction=0.5), 10, 1000)
