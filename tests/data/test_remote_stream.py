"""Batches from a server that misbehaves: the same as from files, on any number of ranks, and counted."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.loader import TokenLoader
from fbitrain.data.tokenizer import load_tokenizer
from tests.data import faulty_http as http

N_SHARDS = 6


def shard_content(i: int) -> bytes:
    lines = [json.dumps({"text": f"shard {i} document {j} " + "x" * (7 * j % 50), "meta": {}}) for j in range(12)]
    return zstandard.compress("\n".join(lines).encode())


@pytest.fixture
def server() -> Iterator[http.FaultyServer]:
    with http.serving() as running:
        yield running


@pytest.fixture
def remote(server: http.FaultyServer, tmp_path: Path) -> DataConfig:
    """Shards on the server, some behind faults that pass, found by a list of URLs that is on the server too."""
    faults = {1: http.first(1, http.half), 2: http.first(1, http.reset), 4: http.first(1, http.status(503))}
    urls = [server.put(f"v1/web/{i}.jsonl.zst", shard_content(i), faults.get(i)) for i in range(N_SHARDS)]
    urls += [server.put("v1/code/0.jsonl.zst", b"of another subset")]
    urls_txt = server.put("v1/urls.txt", "\n".join(urls).encode())
    source = SourceConfig("web", url_lists=[urls_txt], include=["*/web/*"])
    return DataConfig([source], seq_len=20, n_lanes=3, n_workers=0, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def local(tmp_path: Path) -> DataConfig:
    (tmp_path / "web").mkdir()
    for i in range(N_SHARDS):
        (tmp_path / "web" / f"{i}.jsonl.zst").write_bytes(shard_content(i))
    return DataConfig([SourceConfig("web", [str(tmp_path / "web")])], seq_len=20, n_lanes=3, n_workers=0)


def test_each_document_once(remote: DataConfig, server: http.FaultyServer, byte_tokenizer: str) -> None:
    with TokenLoader(remote, load_tokenizer(byte_tokenizer), 0, 1, 1, log_documents=True) as loader:
        documents: list[str] = []
        while loader.stats()["epochs"]["web"] < 1:
            next(loader)
            documents += loader.take_documents()
        cache = loader.stats()["cache"]
    first = [name for name in documents if "#" not in name]
    assert sorted(first) == sorted(f"web/{i}.jsonl.zst:{line}" for i in range(N_SHARDS) for line in range(12))
    assert cache["fetched_files"] == N_SHARDS
    assert cache["retries"] == 3
    assert server.requests["v1/code/0.jsonl.zst"] == 0


def test_a_resumed_run_fetches_nothing_again(
    remote: DataConfig, server: http.FaultyServer, byte_tokenizer: str
) -> None:
    with TokenLoader(remote, load_tokenizer(byte_tokenizer), 0, 1, 2) as loader:
        for _ in range(40):
            next(loader)
        state, shards = json.loads(json.dumps(loader.state())), loader.shard_list()
        expected = [next(loader).tolist() for _ in range(20)]
    before = sum(n for path, n in server.requests.items() if path.startswith("v1/web"))
    for n_workers in (0, 1):
        resumed = dataclasses.replace(remote, n_workers=n_workers)
        with TokenLoader(
            resumed, load_tokenizer(byte_tokenizer), 0, 1, 2, states=[state], saved_shards=shards
        ) as loader:
            assert [next(loader).tolist() for _ in range(20)] == expected
    assert sum(n for path, n in server.requests.items() if path.startswith("v1/web")) == before


def test_a_shard_that_cannot_be_had_stops_the_run(
    remote: DataConfig, server: http.FaultyServer, byte_tokenizer: str
) -> None:
    server.faults["v1/web/3.jsonl.zst"] = http.status(404)
    with (
        TokenLoader(remote, load_tokenizer(byte_tokenizer), 0, 1, 1) as loader,
        pytest.raises(UserError, match=r"web/3\.jsonl\.zst.*404"),
    ):
        list(itertools.islice(loader, 1000))


def test_no_request_per_shard_at_the_start(remote: DataConfig, server: http.FaultyServer, byte_tokenizer: str) -> None:
    with TokenLoader(remote, load_tokenizer(byte_tokenizer), 0, 1, 1) as loader:
        assert dict(server.requests) == {"v1/urls.txt": 1}
        assert loader.shard_list()["web"] == {f"{i}.jsonl.zst": -1 for i in range(N_SHARDS)}


def test_a_local_shard_that_changes_or_vanishes_under_us(local: DataConfig, byte_tokenizer: str) -> None:
    folder = Path(local.sources[0].paths[0])
    with TokenLoader(local, load_tokenizer(byte_tokenizer), 0, 1, 1) as loader:
        next(loader)
        with open(folder / "5.jsonl.zst", "ab") as file:
            file.write(shard_content(9))
        with pytest.raises(UserError, match=r"5\.jsonl\.zst of source 'web' has changed since the run began"):
            list(itertools.islice(loader, 1000))
    (folder / "5.jsonl.zst").write_bytes(shard_content(5))
    with TokenLoader(local, load_tokenizer(byte_tokenizer), 0, 1, 1) as loader:
        for path in folder.iterdir():
            path.unlink()
        with pytest.raises(UserError, match=r"zst of source 'web' was there when the run began"):
            next(loader)
    for i in range(N_SHARDS):
        (folder / f"{i}.jsonl.zst").write_bytes(shard_content(i))
    with TokenLoader(local, load_tokenizer(byte_tokenizer), 0, 1, 1) as loader:
        next(loader)
        for path in folder.iterdir():  # the shard being read, too: the file is still open, its name is gone
            path.unlink()
        with pytest.raises(UserError, match=r"zst of source 'web' was there when the run began"):
            list(itertools.islice(loader, 1000))
