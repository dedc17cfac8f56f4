"""Checksums count for what the cache holds already, and each file is read for them once."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.sources import cache
from fbitrain.data.sources.remote import FetchPolicy
from fbitrain.data.sources.shards import Shard
from tests.data import faulty_http as http

CONTENT = random.Random(0).randbytes(3_000_000)  # more than is hashed at a time
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server() -> Iterator[http.FaultyServer]:
    with http.serving() as running:
        yield running


@pytest.fixture
def shard(server: http.FaultyServer) -> Shard:
    return Shard(server.put("a.jsonl", CONTENT), "a.jsonl", -1)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sums that were calculated of cached files."""
    sums: list[str] = []
    original = cache.sha256_of

    def counting(file: Path) -> str:
        sums.append(original(file))
        return sums[-1]

    monkeypatch.setattr(cache, "sha256_of", counting)
    return sums


def read(folder: Path, shard: Shard) -> bytes:
    """Through a new cache, as another process would."""
    policy = FetchPolicy(attempts=3, backoff_s=0.01)
    with cache.ShardCache(str(folder), 100_000_000, policy=policy).open(shard) as opened:
        return Path(opened.path).read_bytes()


def test_a_sum_that_becomes_known_is_applied_once(
    server: http.FaultyServer, shard: Shard, tmp_path: Path, hashed: list[str]
) -> None:
    read(tmp_path, shard)
    for _ in range(3):
        assert read(tmp_path, replace(shard, sha256=SHA256)) == CONTENT
    assert (hashed, server.requests["a.jsonl"]) == ([SHA256], 1)


def test_what_was_verified_when_it_came_is_not_read_again(
    server: http.FaultyServer, shard: Shard, tmp_path: Path, hashed: list[str]
) -> None:
    for sha256 in (SHA256, SHA256, ""):
        assert read(tmp_path, replace(shard, sha256=sha256)) == CONTENT
    assert (hashed, server.requests["a.jsonl"]) == ([], 1)


def test_what_has_another_sum_is_fetched_again(server: http.FaultyServer, shard: Shard, tmp_path: Path) -> None:
    read(tmp_path, shard)
    (path,) = tmp_path.glob("*-a.jsonl")
    path.write_bytes(CONTENT[::-1])  # of the same size, which is all that can be seen of it
    assert read(tmp_path, shard) == CONTENT[::-1]
    assert read(tmp_path, replace(shard, sha256=SHA256)) == CONTENT
    assert server.requests["a.jsonl"] == 2


def test_a_corrected_sum_counts_and_a_wrong_one_leaves_nothing(
    server: http.FaultyServer, shard: Shard, tmp_path: Path
) -> None:
    read(tmp_path, replace(shard, sha256=SHA256))
    server.put("a.jsonl", CONTENT[::-1])
    corrected = hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert read(tmp_path, replace(shard, sha256=corrected)) == CONTENT[::-1]
    with pytest.raises(UserError, match="is not the file that the checksums tell of"):
        read(tmp_path, replace(shard, sha256="0" * 64))
    assert not list(tmp_path.glob("*-a.jsonl"))


def test_a_cache_from_before_sums_were_recorded_is_kept(
    server: http.FaultyServer, shard: Shard, tmp_path: Path
) -> None:
    read(tmp_path, shard)
    (record,) = tmp_path.glob("*a.jsonl.lock")
    record.write_text(json.dumps({"url": shard.path, "size": len(CONTENT), "version": '"etag"'}))
    assert read(tmp_path, replace(shard, sha256=SHA256)) == CONTENT
    assert server.requests["a.jsonl"] == 1
