"""Batches of a rank: continued bit for bit, redistributed over other ranks, and never hanging on a lost worker."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fbitrain.data.config import DataConfig, PhaseConfig, SourceConfig
from fbitrain.data.duplicates import write_duplicates
from fbitrain.data.errors import DataError
from fbitrain.data.loader import TokenLoader
from fbitrain.data.pretokenize import pretokenize
from fbitrain.data.streaming.plan import find_sources
from fbitrain.data.streaming.worker import WorkerProcess

BOS, EOS = 256, 257
SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst"]


def corpus(root: Path, write_shard: Any, n_documents: int = 60) -> DataConfig:
    """Two sources in three formats; every document is unique and says where it comes from."""
    for name, factor in (("web", 3), ("code", 11)):
        for i, suffix in enumerate(SUFFIXES):
            texts = [f"{name} {i} {j} " + "é" * (j * factor % 29) for j in range(n_documents // 3 + i)]
            write_shard(root / name / f"{i}{suffix}", texts)
    sources = [SourceConfig("web", [str(root / "web")], 2.0), SourceConfig("code", [str(root / "code")], 1.0)]
    return DataConfig(sources=sources, seq_len=31, n_lanes=5, n_workers=0, seed=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_shard: Any) -> DataConfig:
    return corpus(tmp_path_factory.mktemp("corpus"), write_shard)


def rank_loader(data: DataConfig, tokenizer: str, rank: int = 0, world_size: int = 1, **more: Any) -> TokenLoader:
    return TokenLoader(data, tokenizer, rank, world_size, **{"micro_batch_size": 2, **more})


def take(loader: TokenLoader, n: int) -> tuple[list[list[list[int]]], Any]:
    """`n` batches as lists, and the last state as a file would give it back."""
    batches = [next(loader).tolist() for _ in range(n)]
    return batches, json.loads(json.dumps(loader.state()))


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


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"n_lanes": 6}, "n_lanes"), ({"seed": 5}, "seed"), ({"seq_len": 32}, "seq_len"), ({"add_eos": False}, "add_eos")],
)
def test_a_state_of_other_settings_is_refused(data: DataConfig, byte_tokenizer: str, changed: Any, key: str) -> None:
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    with pytest.raises(DataError, match=f"has {key}={getattr(data, key)}, this run has {key}={changed[key]}"):
        rank_loader(dataclasses.replace(data, **changed), byte_tokenizer, states=[state])


def test_a_state_of_other_duplicates_is_refused(data: DataConfig, byte_tokenizer: str, tmp_path: Path) -> None:
    lists = []
    for i, lines in enumerate(([1], [1, 2])):
        lists.append(str(tmp_path / f"{i}.npz"))
        write_duplicates(Path(lists[i]), find_sources(data), [("web", "0.jsonl", np.array(lines))])
    _, state = take(rank_loader(dataclasses.replace(data, duplicates=lists[0]), byte_tokenizer), 1)
    with pytest.raises(DataError, match="has duplicates="):
        rank_loader(dataclasses.replace(data, duplicates=lists[1]), byte_tokenizer, states=[state])


def test_other_tokenizers_sources_and_ranks_are_refused(data: DataConfig, byte_tokenizer: str, tmp_path: Path) -> None:
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    content = (Path(byte_tokenizer) / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("</s>", "<end>"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 256, "eos_token_id": [257]}')
    with pytest.raises(DataError, match="tokenizer="):
        rank_loader(data, str(tmp_path), states=[state])
    with pytest.raises(DataError, match="sources are code, web, this run's are web"):
        rank_loader(dataclasses.replace(data, sources=data.sources[:1]), byte_tokenizer, states=[state])
    with pytest.raises(DataError, match="give the state of every rank"):
        rank_loader(data, byte_tokenizer, states=[state, state])
    _, half = take(rank_loader(data, byte_tokenizer, 1, 2), 1)
    with pytest.raises(DataError, match=r"miss lanes \[0, 2, 4\]"):
        rank_loader(data, byte_tokenizer, states=[half])
    with pytest.raises(DataError, match="n_lanes=5 is less than the 6 ranks"):
        rank_loader(data, byte_tokenizer, 0, 6)


def test_changed_shards_are_refused(tmp_path: Path, byte_tokenizer: str, write_shard: Any) -> None:
    data = corpus(tmp_path, write_shard, 9)
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    saved = rank_loader(data, byte_tokenizer).shard_list()
    with open(tmp_path / "web" / "0.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"'web'.*0\.jsonl had \d+ bytes and has \d+"):
        rank_loader(data, byte_tokenizer, states=[state], saved_shards=saved)
    with pytest.raises(DataError, match=r"'web'.*their sizes differ"):
        rank_loader(data, byte_tokenizer, states=[state])


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
            with pytest.raises(DataError, match=rf"rank {rank} has no documents left.*n_lanes=4 lanes"):
                next(loader)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_corpus_without_documents(tmp_path: Path, byte_tokenizer: str, n_workers: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    data = DataConfig([SourceConfig("a", [str(tmp_path)])], seq_len=5, n_lanes=2, n_workers=n_workers)
    with rank_loader(data, byte_tokenizer) as loader, pytest.raises(DataError, match="no documents left"):
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
            DataError,
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


def workers(loader: TokenLoader) -> list[WorkerProcess]:
    return [feed for feed in loader._feeds.values() if isinstance(feed, WorkerProcess)]


def test_workers_ignore_a_launchers_signals_and_end_with_close(data: DataConfig, byte_tokenizer: str) -> None:
    loader = rank_loader(dataclasses.replace(data, n_workers=1), byte_tokenizer)
    process = workers(loader)[0].process
    for number in (signal.SIGTERM, signal.SIGINT):  # at once, while the interpreter is still starting
        os.kill(process.pid, number)
    first, _ = take(loader, 3)
    os.kill(process.pid, signal.SIGTERM)
    assert first + take(loader, 300)[0] == take(rank_loader(data, byte_tokenizer), 303)[0]
    loader.close()
    loader.close()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_worker_is_an_error(data: DataConfig, byte_tokenizer: str) -> None:
    with rank_loader(dataclasses.replace(data, n_workers=2), byte_tokenizer) as loader:
        next(loader)
        workers(loader)[1].process.kill()
        with pytest.raises(DataError, match="was killed by signal 9"):
            take(loader, 100_000)


def test_a_worker_that_raises_is_an_error(data: DataConfig, byte_tokenizer: str, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.setattr("fbitrain.data.streaming.worker.COMMAND", "raise MemoryError('no room')")
    with pytest.raises(DataError, match="ended with exit status 1"):
        next(rank_loader(dataclasses.replace(data, n_workers=1), byte_tokenizer))
    assert "no room" in capfd.readouterr().err


def test_workers_end_with_a_killed_parent(data: DataConfig, byte_tokenizer: str, tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"  # no main guard: a worker must not import it
    script.write_text(
        "from fbitrain.data.loader import TokenLoader\n"
        "from fbitrain.data.config import *\n"
        f"loader = TokenLoader({dataclasses.replace(data, n_workers=1)!r}, {byte_tokenizer!r}, 0, 1, 1)\n"
        "next(loader)\n"
        "import os, sys\n"
        "if os.fork():\n"
        "    print(loader._feeds[0].process.pid, flush=True)\n"
        "sys.stdin.read()\n"  # both stay; the child, as a fork does, holds the worker's pipe open
        "os._exit(0)\n"
    )
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        worker = os.pidfd_open(int(trainer.stdout.readline()))
        trainer.kill()
        readable = select.select([worker], [], [], 10.0)[0]  # a pidfd turns readable when its process ends
        os.close(worker)
    assert readable


def test_workers_need_neither_torch_nor_transformers() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub'}"
    check = f"import sys, fbitrain.data.streaming.worker; sys.exit(bool({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.fixture(scope="module")
def tokenized(data: DataConfig, byte_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("tokens")
    pretokenize(data, byte_tokenizer, folder, n_workers=1)
    return dataclasses.replace(data, pretokenized=str(folder))


def test_tokens_are_of_the_sources_that_the_configuration_names(tokenized: DataConfig, byte_tokenizer: str) -> None:
    """What text would refuse, or leave out, its tokens must not sneak in."""
    web = tokenized.sources[0]
    held = dataclasses.replace(tokenized, heldout=[f"{web.paths[0]}/0.jsonl"])
    with pytest.raises(DataError, match=r"0\.jsonl is both held out and part of source 'web'"):
        rank_loader(held, byte_tokenizer)
    for changed in ({"skip": ["0.jsonl"]}, {"text_key": "content"}, {"kind": "token_ids"}):
        sources = [dataclasses.replace(web, **changed), *tokenized.sources[1:]]
        with pytest.raises(DataError, match="'web'"):
            rank_loader(dataclasses.replace(tokenized, sources=sources), byte_tokenizer)


def test_tokens_outlive_their_text(tokenized: DataConfig, byte_tokenizer: str) -> None:
    gone = [dataclasses.replace(source, paths=["/nowhere"]) for source in tokenized.sources]
    without_text = dataclasses.replace(tokenized, sources=gone)
    assert take(rank_loader(without_text, byte_tokenizer), 3) == take(rank_loader(tokenized, byte_tokenizer), 3)


def test_another_kind_of_place_is_another_plan(data: DataConfig, byte_tokenizer: str) -> None:
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    saved = {name: dict.fromkeys(shards, -1) for name, shards in rank_loader(data, byte_tokenizer).shard_list().items()}
    state["fingerprint"]["web"]["sha256"] = "of unknown sizes"
    with pytest.raises(DataError, match=r"the size of 0\.jsonl was not known then and is now"):
        rank_loader(data, byte_tokenizer, states=[state], saved_shards=saved)


def test_other_fields_are_another_stream(data: DataConfig, byte_tokenizer: str) -> None:
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    sources = [dataclasses.replace(data.sources[0], text_key="content"), *data.sources[1:]]
    with pytest.raises(DataError, match=r"'web' was read as text from field 'text' .* reads text from 'content'"):
        rank_loader(dataclasses.replace(data, sources=sources), byte_tokenizer, states=[state])


def test_a_document_that_changed_under_a_stopped_run(tmp_path: Path, byte_tokenizer: str, write_shard: Any) -> None:
    """Of the same size, so only the document that was in use can tell."""
    path = write_shard(tmp_path / "a.jsonl", ["x" * 400] * 5)
    data = DataConfig([SourceConfig("a", [str(tmp_path)])], seq_len=31, n_lanes=1, n_workers=0)
    _, state = take(rank_loader(data, byte_tokenizer), 1)
    path.write_bytes(path.read_bytes().replace(b"x" * 10, b"\\u00e9" + b"xxxx"))
    with pytest.raises(DataError, match=r"a\.jsonl of source 'a' has changed since the run began: the document in use"):
        next(rank_loader(data, byte_tokenizer, states=[state]))


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
