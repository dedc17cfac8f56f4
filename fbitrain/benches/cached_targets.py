"""What a cache of a teacher's targets costs to write and to read, and what it saves in a step of training.

    python -m fbitrain.benches.cached_targets CONFIG.yaml [section.key=value …] [--documents 24] [--draws 50] [--help]

A few documents of the configuration's first source are tokenized and given targets in a temporary folder. In turns in
one process run then the teacher's bare forward (hidden states and all logits) beside the same batches with targets
drawn from them, and optimizer steps on labels alone, on cached targets, and with the teacher. Memory is the peak of a
process of its own for each of the three.

Where the configuration has a cache (distill.cache), reading that one is measured instead: of a few documents the time
would be that of opening their files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fbitrain.build import build_teacher, open_stream
from fbitrain.cache_teacher import CacheOptions, settings_of
from fbitrain.config import Config, load_config
from fbitrain.data.commands.pretokenize import pretokenize
from fbitrain.data.config import SourceConfig
from fbitrain.data.pretokenized.token_shards import TokenIndex
from fbitrain.data.sources.shards import find_shards
from fbitrain.data.streaming.plan import record_format
from fbitrain.data.streaming.stream import border_tokens
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.data.tools.corpus import read_documents
from fbitrain.engine import Engine, init_distributed
from fbitrain.model.build import build_student
from fbitrain.step_targets import StepTargets
from fbitrain.student import Student
from fbitrain.targets import pieces as work
from fbitrain.targets.cache_reader import TargetCache
from fbitrain.targets.cache_writer import CHUNK_TOKENS, PieceWriter
from fbitrain.teacher import Teacher

MIB = 2**20
MOST_READ_TOKENS = 2**20
WAYS = ("labels alone", "cached targets", "live teacher")


def main() -> None:
    arguments = parse_args()
    config = load_config(arguments.config, arguments.overrides)
    if config.distill.cache:
        bench_reading(config, arguments.repeats)
        return
    with TemporaryDirectory(prefix="fbitrain-targets-") as folder:
        config = small_corpus(config, Path(folder), arguments.documents)
        init_distributed(config)
        teacher = build_teacher(config)
        assert teacher is not None, "the configuration names no teacher"
        cache = bench_writing(config, Path(folder) / "cache", teacher, arguments)
        bench_steps(config, cache, teacher, arguments.steps)
        if arguments.memory:
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
                for way in WAYS:
                    peak = pool.apply(peak_bytes, (config, str(cache.folder), way))
                    print(f"{way:<16}{peak / MIB:9.0f} MiB at the peak of a process")


def small_corpus(config: Config, folder: Path, n_documents: int) -> Config:
    """`config` on the first documents of its first source, tokenized."""
    source = config.data.sources[0]
    shard = find_shards(source)[0]
    documents = itertools.islice(read_documents(shard.path, record_format(source), shard.path), n_documents)
    lines = [json.dumps({"text": item[1].text}) for item in documents if isinstance(item, tuple)]
    (folder / "part.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources = [SourceConfig(source.name, [str(folder / "part.jsonl")])]
    data = replace(config.data, sources=sources, pretokenized="", phases=[], duplicates="", n_lanes=1)
    pretokenize(data, config.data.tokenizer, folder / "tokens", 1)
    # A batch of the configuration's on all its ranks is here one of the same micro-batches on one.
    train = replace(config.train, global_batch_tokens=config.train.micro_batch_size * config.data.seq_len)
    return replace(config, data=replace(data, pretokenized=str(folder / "tokens")), train=train)


def bench_writing(config: Config, out: Path, teacher: Teacher, arguments: argparse.Namespace) -> TargetCache:
    """Writes the cache, its batches timed in turns with the bare forward of the same ones."""
    options = CacheOptions(out, arguments.draws, 0, False, 1.0, 0, 0, 0, arguments.batch_tokens, False)
    tokenizer, index = load_tokenizer(config.data.tokenizer), TokenIndex(config.data.pretokenized)
    settings = settings_of(config, options, tokenizer)
    every = list(work.cut(index, [config.data.sources[0].name]))
    work.claim(out, settings)
    border = border_tokens(tokenizer, config.data.add_bos, config.data.add_eos)
    timed = TimedTeacher(teacher)
    writer = PieceWriter(out, index, settings, border, timed, arguments.batch_tokens)
    both = timed_steps(itertools.chain.from_iterable(writer.write(piece) for piece in every))
    work.join(out, every)
    bare = sum(timed.seconds[1:])  # the first one warms up
    whole = sum(both[1:]) - bare
    print(
        f"writing: {writer.n_tokens:,} tokens, {writer.n_words / writer.n_tokens:.1f} words and "
        f"{writer.n_bytes / writer.n_tokens:.1f} bytes per token; {bare / whole:.2f} of the speed of the bare forward"
    )
    cache = TargetCache(out)
    cache.cover(index, [config.data.sources[0].name])
    return cache


class TimedTeacher:
    """A teacher that first computes each batch and all its logits for nothing, and notes how long that took."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher, self.head_weight = teacher, teacher.head_weight
        self.seconds: list[float] = []

    def hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        for rows in torch.split(self._teacher.hidden(input_ids).flatten(0, 1), CHUNK_TOKENS):
            rows @ self.head_weight.t()
        self.seconds.append(time.perf_counter() - started)
        return self._teacher.hidden(input_ids)


def timed_steps(steps: Iterable[int]) -> list[float]:
    seconds = []
    started = time.perf_counter()
    for _ in steps:
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return seconds


def bench_reading(config: Config, repeats: int) -> None:
    """Targets of batches of the stream, from files that the system holds in memory: each frame is decoded once.

    CPU time of the one thread that reads, the best of `repeats`: other jobs only add to it.
    """
    index = TokenIndex(config.data.pretokenized)
    n_tokens = sum(report.n_tokens for source in config.data.sources for report in index.sources[source.name])
    batch_tokens = config.train.micro_batch_size * config.data.seq_len
    with open_stream(config, load_tokenizer(config.data.tokenizer), 0, 1, None) as loader:
        spans = [
            (next(loader), loader.spans())[1] for _ in range(max(1, min(n_tokens, MOST_READ_TOKENS) // batch_tokens))
        ]
    seconds = []
    for _ in range(repeats):
        cache = TargetCache(config.distill.cache)
        started = time.thread_time()
        for of_batch in spans:
            cache.read(of_batch)
        seconds.append(time.thread_time() - started)
    speed = len(spans) * batch_tokens / min(seconds)
    print(
        f"reading: {speed / 1e6:.1f} million tokens per second of CPU in batches of {config.train.micro_batch_size} x "
        f"{config.data.seq_len} (best of {repeats})"
    )


def bench_steps(config: Config, cache: TargetCache, teacher: Teacher, n_steps: int) -> None:
    step = stepper(config, {way: targets_for(way, cache, teacher) for way in WAYS})
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(n_steps + 2):
        for way in WAYS:
            started = time.perf_counter()
            step(way)
            seconds[way].append(time.perf_counter() - started)
    medians = {way: statistics.median(times[2:]) for way, times in seconds.items()}
    for way, median in medians.items():
        ratio = median / medians[WAYS[0]]
        print(f"{way:<16}{1000 * median:9.1f} ms per step, {ratio:.2f} times labels alone (n={n_steps})")
    print(f"cached targets have {medians[WAYS[2]] / medians[WAYS[1]]:.2f} times the tokens/s of the live teacher")


def targets_for(way: str, cache: TargetCache, teacher: Teacher | None) -> StepTargets:
    return StepTargets(teacher if way == WAYS[2] else None, cache if way == WAYS[1] else None, False)


def stepper(config: Config, targets: dict[str, StepTargets]) -> Callable[[str], None]:
    """One optimizer step on the next batch, with the targets that are named."""
    caching = replace(config, distill=replace(config.distill, cache="the spans are asked for"))
    loader = open_stream(caching, load_tokenizer(config.data.tokenizer), 0, 1, None)
    lm, _ = build_student(config.model, config.binarize, config.train.seed)
    engine = Engine(config, Student(lm, config.distill))
    steps = itertools.count(1)

    def step(way: str) -> None:
        batch = next(loader)
        loss, _ = engine(batch, **targets[way].ask(batch, targets[way].read(loader.spans())))
        engine.backward(loss)
        engine.end_step(min(next(steps), config.train.total_steps), "", lambda norm: "")

    return step


def peak_bytes(config: Config, folder: str, way: str) -> int:
    """The resident set at the peak of a few steps, in a fresh process."""
    init_distributed(config)
    cache = TargetCache(folder)
    cache.cover(TokenIndex(config.data.pretokenized), [config.data.sources[0].name])
    teacher = build_teacher(config) if way == WAYS[2] else None
    step = stepper(config, {way: targets_for(way, cache, teacher)})
    for _ in range(3):
        step(way)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status[status.index("VmHWM:") :].split()[1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("config", help="a training configuration with a teacher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--documents", type=int, default=24, help="of the first source")
    parser.add_argument("--draws", type=int, default=50, help="per token")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="of a forward of the teacher when writing")
    parser.add_argument("--steps", type=int, default=15, help="steps whose median is taken, of each way")
    parser.add_argument("--repeats", type=int, default=20, help="readings of which the fastest is taken")
    parser.add_argument("--memory", action="store_true", help="measure the peak of memory too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
