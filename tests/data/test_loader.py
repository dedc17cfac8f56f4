"""Batches of a rank: continued bit for bit, redistributed over other ranks, every document once."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fbitrain.base.errors import UserError
from fbitrain.data.commands.pretokenize import pretokenize
from fbitrain.data.config import DataConfig, PhaseConfig, SourceConfig
from fbitrain.data.loader import TokenLoader
from tests.data.corpora import rank_loader, take

BOS, EOS = 256, 257


def test_batches_are_int64_of_seq_len_plus_1(data: DataConfig, byte_tokenizer: str) -> None:
    with rank_loader(data, byte_tokenizer, micro_batch_size=3) as loader:
        batch = next(loader)
        state, stats = loader.state(), loader.stats()
    assert (batch.dtype, tuple(batch.shape)) == (torch.int64, (3, 32))
    assert (state["next_lane"], state["drawn"]) == (3, 3)
    assert set(stats["tokens"]) == {"web", "code"}
    assert sum(stats["tokens"].values()) >= 96


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stop", [1, 3])
def test_same_world_size_continues_bit_for_bit(
    data: DataConfig, byte_tokenizer: str, world_size: int, stop: int
) -> None:
    whole, states, ends = [], [], []
    for rank in range(world_size):
        with rank_loader(data, byte_tokenizer, rank, world_size) as loader:
            _, state = take(loader, stop)
            rest, end = take(loader, 6)
        whole.append(rest)
        states.append(state)
        ends.append(end)
    for rank in range(world_size):
        resumed = rank_loader(data, byte_tokenizer, rank, world_size, states=states[::-1])
        assert take(resumed, 6) == (whole[rank], ends[rank])


def test_workers_change_nothing(data: DataConfig, byte_tokenizer: str) -> None:
    expected, end = take(rank_loader(data, byte_tokenizer), 20)
    with rank_loader(dataclasses.replace(data, n_workers=2), byte_tokenizer) as loader:
        first, state = take(loader, 7)  # the workers are ahead by now, which must not show
    with rank_loader(dataclasses.replace(data, n_workers=3), byte_tokenizer, states=[state]) as loader:
        second, state = take(loader, 13)
    assert first + second == expected
    assert state == end


def test_micro_batch_size_may_change(data: DataConfig, byte_tokenizer: str) -> None:
    expected, _ = take(rank_loader(data, byte_tokenizer, micro_batch_size=1), 12)
    first, state = take(rank_loader(data, byte_tokenizer, micro_batch_size=3), 1)
    second, _ = take(rank_loader(data, byte_tokenizer, micro_batch_size=9, states=[state]), 1)
    assert [[row] for batch in first + second for row in batch] == expected


def by_lane(loader: TokenLoader, n: int) -> tuple[dict[str, list[int]], Any]:
    """Tokens drawn from each lane (the one drawn last is the last in turn), and the last state."""
    drawn: dict[str, list[int]] = {}
    for _ in range(n):
        batch = next(loader)
        drawn.setdefault(str(loader._turn[-1]), []).extend(batch[0].tolist())
    return drawn, json.loads(json.dumps(loader.state()))


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(phases=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=2, max_size=5))
def test_no_document_is_lost_or_repeated_over_world_sizes(
    data: DataConfig, byte_tokenizer: str, phases: list[tuple[int, int]]
) -> None:
    """Stopped and continued on other numbers of ranks, every lane gives the stream it gives undisturbed."""
    drawn: dict[str, list[int]] = {str(lane): [] for lane in range(data.n_lanes)}
    states = None
    for world_size, n in phases:
        ended = []
        for rank in range(world_size):
            loader = rank_loader(data, byte_tokenizer, rank, world_size, micro_batch_size=1, states=states)
            tokens, state = by_lane(loader, n)
            for lane, ids in tokens.items():
                drawn[lane] += ids
            ended.append(state)
        states = ended
    most = max(map(len, drawn.values())) // (data.seq_len + 1)
    undisturbed, _ = by_lane(rank_loader(data, byte_tokenizer, micro_batch_size=1), most * data.n_lanes)
    for lane, ids in drawn.items():
        assert ids == undisturbed[lane][: len(ids)]


def test_each_document_once_per_epoch_over_all_ranks(data: DataConfig, byte_tokenizer: str) -> None:
    _, states = zip(*(take(rank_loader(data, byte_tokenizer, rank, 2), 8) for rank in range(2)), strict=True)
    documents: Counter[str] = Counter()
    for rank in range(2):  # all lanes from the start, as the rank that owns them sees them
        loader = rank_loader(data, byte_tokenizer, rank, 2, micro_batch_size=1)
        tokens, state = by_lane(loader, 900)
        assert all(source[0] >= 1 for lane in state["lanes"].values() for source in lane["sources"].values())  # epochs
        for ids in tokens.values():
            text = loader_text(ids)
            documents.update(dict.fromkeys(text, 1))
    assert sorted(documents) == sorted(set(documents))
    assert len(documents) == 2 * (20 + 21 + 22)
    assert set(documents.values()) == {1}  # no document in two lanes
    assert {lane for state in states for lane in state["lanes"]} == {str(lane) for lane in range(5)}


def loader_text(ids: list[int]) -> list[str]:
    """The beginnings ('web 0 1') of the whole documents in a lane's tokens."""
    found, start = [], None
    for i, token in enumerate(ids):
        if token == BOS:
            start = i + 1
        elif token == EOS and start is not None:
            found.append(tuple(ids[start:i]))
    return [str(document) for document in found]


def test_few_documents_for_many_lanes(tmp_path: Path, byte_tokenizer: str, write_shard: Any, caplog: Any) -> None:
    write_shard(tmp_path / "a.jsonl", ["only", "two"])
    data = DataConfig([SourceConfig("a", [str(tmp_path)])], seq_len=5, n_lanes=4, n_workers=0)
    batches, state = take(rank_loader(data, byte_tokenizer), 10)
    assert caplog.text.count("source 'a' has no document for it") == 2
    assert (
        take(rank_loader(data, byte_tokenizer, states=[state]), 5)[0]
        == take(rank_loader(data, byte_tokenizer), 15)[0][10:]
    )
    with rank_loader(dataclasses.replace(data, n_workers=3), byte_tokenizer) as loader:
        assert take(loader, 10) == (batches, state)
    left = sorted(int(lane) for lane, at in state["lanes"].items() if not at["empty"])
    assert len(left) == 2
    for rank in range(4):
        loader = rank_loader(data, byte_tokenizer, rank, 4)
        if rank in left:
            next(loader)
        else:
            with pytest.raises(UserError, match=rf"rank {rank} has no documents left.*n_lanes=4 lanes"):
                next(loader)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_corpus_without_documents(tmp_path: Path, byte_tokenizer: str, n_workers: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    data = DataConfig([SourceConfig("a", [str(tmp_path)])], seq_len=5, n_lanes=2, n_workers=n_workers)
    with rank_loader(data, byte_tokenizer) as loader, pytest.raises(UserError, match="no documents left"):
        next(loader)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_bad_records_are_logged_counted_and_limited_per_rank(
    tmp_path: Path, byte_tokenizer: str, n_workers: int, caplog: Any
) -> None:
    good = b'{"text": "a document of some length"}\n'
    (tmp_path / "a.jsonl").write_bytes((good * 2 + b"bad\n" * 2) * 10)
    data = DataConfig(
        [SourceConfig("a", [str(tmp_path)])], seq_len=7, n_lanes=4, n_workers=n_workers, max_bad_records=20
    )
    with rank_loader(data, byte_tokenizer) as loader:
        take(loader, 60)
        assert loader.stats()["bad_records"] == 20
    assert f"skipped {tmp_path}/a.jsonl, line 4: not JSON" in caplog.text
    with (
        rank_loader(dataclasses.replace(data, max_bad_records=19), byte_tokenizer) as loader,
        pytest.raises(
            UserError,
            match=r"more than data\.max_bad_records=19 bad records, the last one in .*a\.jsonl, line \d+: not JSON",
        ),
    ):
        take(loader, 60)


def test_state_is_small(tmp_path: Path, byte_tokenizer: str, write_shard: Any) -> None:
    sources = []
    for i in range(7):
        write_shard(tmp_path / f"source_{i}" / "a.jsonl.zst", ["text " * 50] * 40)
        sources.append(SourceConfig(f"source_{i}", [str(tmp_path / f"source_{i}")], 1.0 + i))
    data = DataConfig(sources, seq_len=64, n_lanes=64, n_workers=0)
    _, state = take(rank_loader(data, byte_tokenizer), 160)
    assert len(state["lanes"]) == 64
    assert len(json.dumps(state)) < 64_000


@pytest.fixture(scope="module")
def tokenized(data: DataConfig, byte_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("tokens")
    pretokenize(data, byte_tokenizer, folder, n_workers=1)
    return dataclasses.replace(data, pretokenized=str(folder))


def test_tokens_are_of_the_sources_that_the_configuration_names(tokenized: DataConfig, byte_tokenizer: str) -> None:
    """What text would refuse, or leave out, its tokens must not sneak in."""
    web = tokenized.sources[0]
    held = dataclasses.replace(tokenized, heldout=[f"{web.paths[0]}/0.jsonl"])
    with pytest.raises(UserError, match=r"0\.jsonl is both held out and part of source 'web'"):
        rank_loader(held, byte_tokenizer)
    for changed in ({"skip": ["0.jsonl"]}, {"text_key": "content"}, {"kind": "token_ids"}):
        sources = [dataclasses.replace(web, **changed), *tokenized.sources[1:]]
        with pytest.raises(UserError, match="'web'"):
            rank_loader(dataclasses.replace(tokenized, sources=sources), byte_tokenizer)


def test_tokens_outlive_their_text(tokenized: DataConfig, byte_tokenizer: str) -> None:
    gone = [dataclasses.replace(source, paths=["/nowhere"]) for source in tokenized.sources]
    without_text = dataclasses.replace(tokenized, sources=gone)
    assert take(rank_loader(without_text, byte_tokenizer), 3) == take(rank_loader(tokenized, byte_tokenizer), 3)


def test_fewer_phases_than_before(data: DataConfig, byte_tokenizer: str) -> None:
    phased = dataclasses.replace(data, phases=[PhaseConfig(1, {"web": 9}), PhaseConfig(2, {"web": 0})])
    _, state = take(rank_loader(phased, byte_tokenizer, sequences_per_step=2), 9)
    assert {lane["phase"] for lane in state["lanes"].values()} == {2}
    take(rank_loader(data, byte_tokenizer, states=[state]), 9)


def test_ready_made_ids_beyond_the_vocabulary(tmp_path: Path, byte_tokenizer: str) -> None:
    lines = [json.dumps({"token_ids": [7] * 12 + [last]}) for last in (7, 99999, 4_000_000_000, 8)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = DataConfig([SourceConfig("a", [str(tmp_path)], kind="token_ids")], seq_len=12, n_lanes=1, n_workers=0)
    loader = rank_loader(data, byte_tokenizer)
    batches, _ = take(loader, 2)
    assert {id for batch in batches for row in batch for id in row} == {7, 8}
    assert loader.stats()["bad_records"] == 2


def test_the_limit_of_bad_records_is_the_runs(tmp_path: Path, byte_tokenizer: str) -> None:
    good = b'{"text": "a document of some length"}\n'
    (tmp_path / "a.jsonl").write_bytes((good * 2 + b"bad\n") * 12)
    data = DataConfig([SourceConfig("a", [str(tmp_path)])], seq_len=7, n_lanes=4, n_workers=0, max_bad_records=16)
    states = [take(rank_loader(data, byte_tokenizer, rank, 2), 40)[1] for rank in range(2)]
    assert take(rank_loader(data, byte_tokenizer, states=states), 40)[1]["drawn"] > 0
