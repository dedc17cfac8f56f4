"""The promise of the stream: whatever happens to a run, every document is seen once per epoch, and in the same order.

Random corpora in every format, any number of lanes, workers and ranks, stopped anywhere, continued on another number of
ranks, from text or from pretokenized shards. `./test.sh` draws 50 examples, `./test.sh --all` 500 others.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fbitrain.data.commands.pretokenize import pretokenize
from fbitrain.data.config import DataConfig, PhaseConfig, SourceConfig
from fbitrain.data.holdout_rule import is_heldout
from fbitrain.data.loader import TokenLoader
from fbitrain.data.reading.documents import Document
from fbitrain.data.streaming.plan import find_sources, plan_lanes
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer

BOS, EOS = 256, 257
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SEQUENCES_PER_STEP = 12
MOST_DRAWS = 20_000
Place = tuple[str, str, int]  # source, shard, line


def write_corpus(draw: Any, root: Path) -> dict[Place, str]:
    """Shards of random shapes; returns the text of every document by its place."""
    texts: dict[Place, str] = {}
    for source in ("one", "two")[: draw(st.integers(1, 2))]:
        (root / source).mkdir()
        for i, n in enumerate(draw(st.lists(st.integers(0, 12), min_size=1, max_size=5))):
            suffix = draw(st.sampled_from(SUFFIXES))
            longest = draw(st.integers(0, 40))
            rows: list[str | None] = []
            for j in range(n):
                # A row without a document here and there: a blank line, or one that is no record.
                rows += [None] * draw(st.integers(0, 1))
                rows.append(f"{source} {i} {j} " + "é" * (j * 7 % (longest + 1)))
            write_rows(root / source / f"{i}{suffix}", rows)
            # The only shard of a folder still has its name relative to that folder.
            texts |= {(source, f"{i}{suffix}", line): row for line, row in enumerate(rows) if row is not None}
    return texts


def write_rows(path: Path, rows: list[str | None]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), path, row_group_size=4)
        return
    lines = [b"" if i % 2 else b"bad" for i in range(len(rows))]
    for i, row in enumerate(rows):
        if row is not None:
            lines[i] = json.dumps({"text": row, "meta": {}}).encode()
    raw = b"".join(line + b"\n" for line in lines)
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(raw))


def draw_config(draw: Any, root: Path, sources: list[str]) -> DataConfig:
    phases = []
    if draw(st.booleans()):
        phases = [PhaseConfig(1, {sources[0]: 5.0}), PhaseConfig(3, {sources[-1]: 0.5})]
    return DataConfig(
        sources=[SourceConfig(name, [str(root / name)], weight=1.0 + i) for i, name in enumerate(sources)],
        phases=phases,
        heldout_fraction=draw(st.sampled_from([0.0, 0.25])),
        seq_len=draw(st.sampled_from([1, 2, 7, 16, 31, 40])),
        seed=draw(st.integers(0, 9)),
        shuffle_block=draw(st.sampled_from([1, 3, 1000])),
        n_lanes=1 if phases else draw(st.integers(1, 5)),  # phases want documents in every lane
        n_workers=0,
    )


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_document_once_per_epoch(data: Any, byte_tokenizer: str, tmp_path_factory: Any) -> None:
    root = tmp_path_factory.mktemp("corpus")
    texts = write_corpus(data.draw, root)
    assume(texts)
    config = draw_config(data.draw, root, sorted({source for source, _, _ in texts}))
    expected = expected_documents(config, texts)
    assume(all(any(expected[lane, source] for source in ("one", "two")) for lane in range(config.n_lanes)))
    tokenized = dataclasses.replace(config, pretokenized=str(root / "tokens"))
    pretokenize(config, byte_tokenizer, root / "tokens", n_workers=1)
    run = Run(expected)
    for world_size, n_batches, kind in legs(data.draw, config.n_lanes):
        leg = dataclasses.replace(tokenized if kind == "tokens" else config, n_workers=int(kind == "worker"))
        run.launch(leg, byte_tokenizer, world_size, lambda n=n_batches: run.draws < n)
    run.launch(config, byte_tokenizer, 1, lambda: run.draws < MOST_DRAWS and not run.passes_done(2))
    assert run.passes_done(1), "the example shows nothing"
    for (lane, source), places in run.seen.items():
        once = expected[lane, source]
        for start in range(0, len(places), len(once)):
            epoch = places[start : start + len(once)]
            assert len(set(epoch)) == len(epoch), "a document came twice in an epoch"
            assert set(epoch) <= once
    check_tokens(run.tokens, run.seen, texts, load_tokenizer(byte_tokenizer))


class Run:
    """A run over several launches, and everything that its lanes gave."""

    def __init__(self, expected: dict[tuple[int, str], set[Place]]) -> None:
        self.expected = {key: places for key, places in expected.items() if places}
        self.seen: dict[tuple[int, str], list[Place]] = defaultdict(list)  # in the order they were begun
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.draws = 0  # batches of the rank that draws
        self._states: list[dict[str, Any]] | None = None
        self._shards: Any = None

    def launch(self, config: DataConfig, tokenizer: str, world_size: int, goes_on: Callable[[], bool]) -> None:
        """All ranks, one after another, from where the last launch stopped; states go through JSON as in a file."""
        ended = []
        for rank in range(world_size):
            with TokenLoader(
                config,
                load_tokenizer(tokenizer),
                rank,
                world_size,
                micro_batch_size=1,
                states=self._states,
                saved_shards=self._shards,
                sequences_per_step=SEQUENCES_PER_STEP,
                log_documents=True,
            ) as loader:
                self.draws = 0
                while goes_on():
                    self._draw(loader)
                ended.append(json.loads(json.dumps(loader.state())))
                shards = json.loads(json.dumps(loader.shard_list()))
        self._states, self._shards = ended, shards

    def passes_done(self, n: int) -> bool:
        """Whether every lane has given every document of every source `n` times."""
        return all(len(self.seen[key]) >= n * len(places) for key, places in self.expected.items())

    def _draw(self, loader: TokenLoader) -> None:
        self.draws += 1
        batch = next(loader)
        lane = loader._turn[-1]
        self.tokens[lane] += batch[0].tolist()
        for name in loader.take_documents():
            path, _, line = name.partition("#")[0].rpartition(":")
            source, _, shard = path.partition("/")
            self.seen[lane, source].append((source, shard, int(line)))


def legs(draw: Any, n_lanes: int) -> Iterator[tuple[int, int, str]]:
    """Launches of one run: ranks, batches per rank until it is stopped, and where tokens come from."""
    for _ in range(draw(st.integers(2, 5))):
        kind = draw(st.sampled_from(["text"] * 7 + ["tokens"] * 4 + ["worker"]))
        yield draw(st.integers(1, n_lanes)), draw(st.integers(1, 40)), kind


def expected_documents(config: DataConfig, texts: dict[Place, str]) -> dict[tuple[int, str], set[Place]]:
    """The documents that each lane must see of each source in every epoch."""
    wanted: dict[tuple[int, str], set[Place]] = defaultdict(set)
    for plan in plan_lanes(config, find_sources(config), sequences_per_step=SEQUENCES_PER_STEP):
        for source in plan.sources:
            for unit in source.units:
                wanted[plan.lane, source.name] |= {
                    place
                    for place, text in texts.items()
                    if place[:2] == (source.name, unit.shard.name)
                    and place[2] % unit.n_parts == unit.part
                    and not is_heldout(Document(text).content_hash, config.seed, config.heldout_fraction)
                }
    return wanted


def check_tokens(
    tokens: dict[int, list[int]],
    seen: dict[tuple[int, str], list[Place]],
    texts: dict[Place, str],
    tokenizer: Tokenizer,
) -> None:
    """What the lanes gave is, document by document, what they said that they gave."""
    for lane, ids in tokens.items():
        array = np.array(ids)
        begins = np.flatnonzero(array == BOS)
        of_lane = [places for (number, _), places in seen.items() if number == lane]
        assert len(begins) == sum(map(len, of_lane))
        found = [tokenizer.decode([i for i in ids[at + 1 : end] if i != EOS]) for at, end in itertools.pairwise(begins)]
        said = {source: iter(places) for (number, source), places in seen.items() if number == lane}
        for text in found:
            assert text == texts[next(said[text.split(" ")[0]])]
