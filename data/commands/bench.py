"""Times the stream beside its peers, in one process and in alternating rounds, and prints one table.

`fbitrain data bench config.yaml [--only text,tokens,startup,memory] [--rounds N] [--memory-gb G]`

    text     the corpus of config.yaml to batches, beside its tokenizer alone on the same documents and `datasets`
    tokens   the same corpus pretokenized, beside litdata if it is installed
    startup  the first batch of a source of 10,000 shards
    memory   one process over a synthetic corpus of G gigabytes: its resident memory, every tenth of the way
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import zstandard

from fbitrain.base.command import config_parser, positive
from fbitrain.data.commands.pretokenize import pretokenize
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.config_file import require_tokenizer
from fbitrain.data.loader import TokenLoader
from fbitrain.data.reading.documents import BadRecord
from fbitrain.data.streaming.plan import find_sources, record_format
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.data.tools.bench_peers import PEERS_OF_TEXT, PEERS_OF_TOKENS, Round, take, timed
from fbitrain.data.tools.corpus import read_documents
from fbitrain.data.tools.tables import table

PARTS = ("text", "tokens", "startup", "memory")
BATCH = 8  # sequences
TEXT_SECONDS = 2.5  # of work per round, about
N_SHARDS = 10_000
SYNTHETIC_SHARD_BYTES = 100_000_000


def main(options: argparse.Namespace) -> None:
    data, tokenizer_path = require_tokenizer(options.config, options.overrides)
    tokenizer = load_tokenizer(tokenizer_path)
    # One rank reads all lanes here: what is timed is a rank's share of the work, not its dealing.
    data = dataclasses.replace(data, n_lanes=8, n_workers=0)
    with tempfile.TemporaryDirectory(prefix="fbitrain-bench-", dir=options.scratch) as folder:
        scratch = Path(folder)
        parts: dict[str, Callable[[], None]] = {
            "text": lambda: bench_text(data, tokenizer, options.rounds),
            "tokens": lambda: bench_tokens(data, tokenizer, options.rounds, scratch),
            "startup": lambda: bench_startup(data, tokenizer, options.rounds, scratch),
            "memory": lambda: bench_memory(data, tokenizer, options.memory_gb, scratch),
        }
        for name in options.only:
            parts[name]()


# -- speed ------------------------------------------------------------------------------------------------------------


def bench_text(data: DataConfig, tokenizer: Tokenizer, rounds: int) -> None:
    """Text to batches. The tokenizer alone on the same documents is the most that any stream can reach."""
    texts = list(itertools.islice(documents(data), 3000))
    started = time.perf_counter()
    rate = sum(len(tokenizer.encode(text)) for text in texts[:300]) / (time.perf_counter() - started)
    n_tokens = int(rate * TEXT_SECONDS)
    competitors: dict[str, Iterator[Round]] = {
        "tokenizer alone, 1 thread": timed(lambda: (len(tokenizer.encode(text)) for text in texts), n_tokens),
        "this stream, in the process": loader_rounds(data, tokenizer, n_tokens),
        "this stream, 1 worker": loader_rounds(dataclasses.replace(data, n_workers=1), tokenizer, n_tokens),
        "this stream, 2 workers": loader_rounds(dataclasses.replace(data, n_workers=2), tokenizer, n_tokens),
    }
    for name, peer in PEERS_OF_TEXT.items():
        competitors[name] = peer(data, tokenizer, BATCH, n_tokens)
    race("text to batches", competitors, rounds, unit=1e3, unit_name="thousand tokens/s")


def bench_tokens(data: DataConfig, tokenizer: Tokenizer, rounds: int, scratch: Path) -> None:
    """Pretokenized shards to batches, in the training process."""
    pretokenize(data, tokenizer.path, scratch / "tokens", n_workers=1)
    ready = dataclasses.replace(data, pretokenized=str(scratch / "tokens"))
    n_tokens = 20_000_000
    competitors = {
        "this stream": loader_rounds(ready, tokenizer, n_tokens),
        "this stream, documents as they lie": loader_rounds(
            dataclasses.replace(ready, shuffle_block=1), tokenizer, n_tokens
        ),
    }
    for name, peer in PEERS_OF_TOKENS.items():
        competitors[name] = peer(scratch, loader_batches(ready, tokenizer), data.seq_len + 1, BATCH, n_tokens)
    race("pretokenized shards to batches", competitors, rounds, unit=1e6, unit_name="million tokens/s")


def race(title: str, competitors: dict[str, Iterator[Round]], rounds: int, unit: float, unit_name: str) -> None:
    """Lets each do its round in turn, the first round unmeasured, and prints medians.

    A ratio is the median over the rounds of a competitor's rate to the first one's in the same round: where a machine's
    speed drifts, only neighbours in time can be compared.
    """
    rates: dict[str, list[float]] = {name: [] for name in competitors}
    missing: list[str] = []
    for i in range(rounds + 1):
        for name, turns in competitors.items():
            run = next(turns, None)
            if run is None:
                missing += [name] if name not in missing else []
                continue
            n_tokens, seconds = run()
            if i:
                rates[name].append(n_tokens / seconds)
    first = next(iter(rates.values()))
    rows = [
        [
            name,
            *(f"{rate / unit:.2f}" for rate in (statistics.median(found), min(found), max(found))),
            f"{statistics.median(rate / base for rate, base in zip(found, first, strict=True)):.2f}",
        ]
        for name, found in rates.items()
        if found
    ]
    print(f"\n{title}: {unit_name}, {rounds} alternating rounds")
    print(table(["", "median", "least", "most", "ratio"], rows))
    for name in missing:
        print(f"not installed: {name}")


def documents(data: DataConfig) -> Iterator[str]:
    """The texts of the corpus, source after source."""
    for source, shards in zip(data.sources, find_sources(data).values(), strict=True):
        format = record_format(source)
        for shard in shards:
            for item in read_documents(shard.path, format, shard.path):
                if not isinstance(item, BadRecord):
                    yield item[1].text


def loader_batches(data: DataConfig, tokenizer: Tokenizer) -> TokenLoader:
    return TokenLoader(data, tokenizer, 0, 1, BATCH)


def loader_rounds(data: DataConfig, tokenizer: Tokenizer, n_tokens: int) -> Iterator[Round]:
    """Each round opens a loader of its own: workers that run ahead must not do so while others are timed."""

    def run() -> tuple[int, float]:
        with loader_batches(data, tokenizer) as loader:
            next(loader)
            return take((batch.numel() for batch in loader), n_tokens)

    while True:
        yield run


# -- start-up and memory ----------------------------------------------------------------------------------------------


def bench_startup(data: DataConfig, tokenizer: Tokenizer, rounds: int, scratch: Path) -> None:
    """From the constructor to the first batch, with 10,000 shards."""
    folder = scratch / "many"
    folder.mkdir()
    for i in range(N_SHARDS):
        (folder / f"{i:05d}.jsonl").write_text('{"text": "' + f"{i} words " * 50 + '"}\n')
    many = dataclasses.replace(data, sources=[SourceConfig("many", [str(folder)])], phases=[], pretokenized="")
    print(f"\nfirst batch with {N_SHARDS:,} shards, from the constructor on: median of {rounds}")
    for n_workers in (0, 1):
        seconds = []
        for _ in range(rounds):
            started = time.perf_counter()
            with loader_batches(dataclasses.replace(many, n_workers=n_workers), tokenizer) as loader:
                next(loader)
                seconds.append(time.perf_counter() - started)
        print(f"  {n_workers} workers: {statistics.median(seconds):.2f} s")


def bench_memory(data: DataConfig, tokenizer: Tokenizer, gigabytes: float, scratch: Path) -> None:
    """Resident memory of a process that streams a synthetic corpus once.

    A tokenizer would take hours for it; what can leak is the reading, so every document becomes one token here.
    """
    folder = scratch / "synthetic"
    folder.mkdir()
    rng = np.random.default_rng(0)
    original = folder / "0000.jsonl.zst"
    original.write_bytes(zstandard.ZstdCompressor(level=3).compress(synthetic_lines(rng)))
    for i in range(1, max(1, round(gigabytes * 1e9 / SYNTHETIC_SHARD_BYTES))):
        (folder / f"{i:04d}.jsonl.zst").hardlink_to(original)
    synthetic = dataclasses.replace(
        data, sources=[SourceConfig("synthetic", [str(folder)])], phases=[], pretokenized="", seq_len=64
    )
    process = psutil.Process()
    loader = TokenLoader(synthetic, load_tokenizer(stub_tokenizer(scratch)), 0, 1, BATCH)
    marks, started = [gigabytes * 1e9 * i / 10 for i in range(1, 11)], time.perf_counter()
    print(f"\nresident memory over {gigabytes:g} GB of .jsonl.zst, {data.n_lanes} lanes in one process")
    while marks:
        next(loader)
        if loader.stats()["bytes"]["synthetic"] >= marks[0] * 0.98:  # the rest is JSON around the text
            print(
                f"  {marks.pop(0) / 1e9:6.1f} GB  {process.memory_info().rss / 1e6:7.0f} MB  "
                f"{time.perf_counter() - started:6.0f} s"
            )
    loader.close()


def synthetic_lines(rng: np.random.Generator) -> bytes:
    """About SYNTHETIC_SHARD_BYTES of records with texts of random words, a few hundred bytes to a megabyte long."""
    words = [bytes(rng.integers(97, 123, int(n), dtype=np.uint8)).decode() for n in rng.integers(2, 10, 4096)]
    lines: list[bytes] = []
    size = 0
    while size < SYNTHETIC_SHARD_BYTES:
        n_words = min(150_000, int(rng.lognormal(6.0, 1.2)) + 1)
        text = " ".join(words[i] for i in rng.integers(0, len(words), n_words))
        lines.append(json.dumps({"text": text, "meta": {"n": len(lines)}}).encode() + b"\n")
        size += len(lines[-1])
    return b"".join(lines)


def stub_tokenizer(scratch: Path) -> Path:
    """A tokenizer.json that makes one unknown token of a whole text."""
    from tokenizers import Tokenizer, models

    path = scratch / "tokenizer.json"
    Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>")).save(str(path))
    (scratch / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return path


def part_names(text: str) -> list[str]:
    """argparse type of a list of PARTS."""
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is no part; the parts are {', '.join(PARTS)}")
    return names


def parser() -> argparse.ArgumentParser:
    found = config_parser("fbitrain data bench", __doc__.splitlines()[0])
    found.add_argument(
        "--only", type=part_names, default="text,tokens,startup", help=f"parts to run, of {', '.join(PARTS)}"
    )
    found.add_argument("--rounds", type=positive, default=5, help="measured rounds of each competitor")
    found.add_argument("--memory-gb", type=float, default=20.0, help="size of the synthetic corpus")
    found.add_argument("--scratch", type=Path, help="folder for what is written meanwhile (default: the system's)")
    return found
