"""Writing a teacher's targets for a pretokenized corpus: ranks take pieces of it in turn until none is left."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch.distributed as dist

from fbitrain.base.errors import UserError
from fbitrain.base.files import lock_folder
from fbitrain.build import build_teacher, check_vocabularies, load_windows, to_int8
from fbitrain.config import Config
from fbitrain.data.pretokenized.token_shards import TokenIndex
from fbitrain.data.streaming.stream import border_tokens
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.engine import init_distributed
from fbitrain.loading.language_model import positions_of
from fbitrain.process import resolve_precision
from fbitrain.ranks import agreed, from_rank_0, progress_bar, say
from fbitrain.targets import pieces as work
from fbitrain.targets.cache_folder import CacheSettings
from fbitrain.targets.cache_writer import PieceWriter
from fbitrain.targets.frames import MOST_VOCAB, MOST_WORDS
from fbitrain.targets.pieces import Piece
from fbitrain.targets.teacher_identity import teacher_fingerprint
from fbitrain.teacher import Teacher

USUAL_CONTEXT = 2048
GB = 1e9
SPARE = 1.1  # of the bytes estimated, so that a corpus unlike its beginning finds room


@dataclass(frozen=True)
class CacheOptions:
    """What the command line says of the targets; 0 stands for the usual value."""

    out: Path
    draws: int
    top: int  # instead of draws
    systematic: bool
    temperature: float
    seed: int
    context: int
    overlap: int
    batch_tokens: int
    estimate_only: bool


def cache_teacher(config: Config, options: CacheOptions) -> None:
    """Brings the cache at `options.out` up to date with the shards of data.pretokenized; every rank calls it.

    What is finished stays. Raises UserError where the cache was begun otherwise or cannot be written.
    """
    rank, world_size = init_distributed(config)
    tokenizer = agreed(lambda: check_vocabularies(config, None))
    settings = agreed(lambda: settings_of(config, options, tokenizer))
    index = agreed(lambda: TokenIndex(config.data.pretokenized))
    agreed(lambda: index.require_tokenizer(tokenizer.fingerprint))
    sources = [source.name for source in config.data.sources]
    every = agreed(lambda: list(work.cut(index, sources)))
    agreed(lambda: take_over(options.out, settings, every) if rank == 0 else None)
    todo = from_rank_0(lambda: work.unfinished(options.out, every))
    say(f"{settings.describe()}: {len(every) - len(todo)} of {len(every)} pieces are finished in {options.out}")
    if todo:
        teacher = agreed(lambda: require_teacher(config, tokenizer))
        border = border_tokens(tokenizer, config.data.add_bos, config.data.add_eos)
        writer = PieceWriter(options.out, index, settings, border, teacher, options.batch_tokens)
        agreed(lambda: estimate(writer, todo, world_size, options.out))
        if not options.estimate_only:
            write_all(writer, todo)
    if not options.estimate_only:
        join_all(options.out, every, rank, world_size)
        say(f"finished; train on it with distill.cache={options.out}")
    dist.barrier()
    dist.destroy_process_group()


def settings_of(config: Config, options: CacheOptions, tokenizer: Tokenizer) -> CacheSettings:
    """Raises UserError for numbers that make no sense together or for this teacher."""
    teacher = config.distill.teacher
    positions = positions_of(teacher)
    context = options.context or min(positions or USUAL_CONTEXT, USUAL_CONTEXT)
    overlap = options.overlap or context // 2
    n = options.top or options.draws
    problems = []
    if positions and context > positions:
        problems.append(f"--context {context} is more than the {positions} positions of {teacher}")
    if not 0 <= overlap < context:
        problems.append(f"--overlap {overlap} must be less than --context {context}")
    if n > min(MOST_WORDS, config.model.vocab_size):
        most = min(MOST_WORDS, config.model.vocab_size)
        problems.append(f"{'--top' if options.top else '--draws'} {n} is more than {most}, the most words of a target")
    if config.model.vocab_size > MOST_VOCAB:
        problems.append(f"model.vocab_size={config.model.vocab_size} is more than a cache's {MOST_VOCAB}")
    if problems:
        raise UserError("; ".join(problems) + "; correct that")
    return CacheSettings(
        kind="top" if options.top else "sampled",
        n=n,
        systematic=options.systematic,
        temperature=options.temperature,
        seed=options.seed,
        context=context,
        overlap=overlap,
        precision="int8, " * config.distill.int8 + str(resolve_precision(config.engine.precision)),
        vocab_size=config.model.vocab_size,
        add_bos=config.data.add_bos,
        add_eos=config.data.add_eos,
        teacher=teacher,
        teacher_fingerprint=teacher_fingerprint(Path(teacher)),
        tokenizer=config.data.tokenizer,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )


def take_over(out: Path, settings: CacheSettings, every: Sequence[Piece]) -> None:
    """Makes the folder ours and clears what killed runs left in it. Rank 0."""
    work.claim(out, settings)
    if not lock_folder(out):
        raise UserError(f"{out} is being written by another process; wait for it, or give another --out")
    work.remove_leftovers(out, every)


def require_teacher(config: Config, tokenizer: Tokenizer) -> Teacher:
    """The teacher, whole on every rank."""
    distill = replace(config.distill, kd_weight=1.0, hidden_weight=0.0)
    teacher = build_teacher(replace(config, distill=distill))
    assert teacher is not None, "kd_weight is 1"
    if config.distill.int8:
        say(f"the teacher in int8: {to_int8(teacher, load_windows(config, tokenizer))}")
    return teacher


def estimate(writer: PieceWriter, todo: Sequence[Piece], world_size: int, out: Path) -> None:
    """Says what the work will take, after a look at some of it. Raises UserError where the disk is too small."""
    some = max(todo, key=lambda piece: piece.n_tokens)
    writer.measure(some)  # to warm up
    started = time.perf_counter()
    n_tokens, n_bytes = writer.measure(some)
    speed = world_size * n_tokens / (time.perf_counter() - started)
    left = sum(piece.n_tokens for piece in todo)
    needed, free = left * n_bytes / max(n_tokens, 1), shutil.disk_usage(out).free
    say(
        f"{left:,} tokens are left: about {needed / GB:.2f} GB ({n_bytes / max(n_tokens, 1):.1f} bytes per token) and "
        f"{left / speed / 3600:.2f} hours ({speed:,.0f} tokens/s on {world_size} ranks); {free / GB:.1f} GB are free"
    )
    if free < SPARE * needed:
        raise UserError(
            f"the targets need about {needed / GB:.1f} GB and {out} has {free / GB:.1f} GB free; make room, give "
            "another --out or fewer --draws"
        )


def write_all(writer: PieceWriter, todo: Sequence[Piece]) -> None:
    """Writes all pieces; a rank that is free takes the next one."""
    store = dist.distributed_c10d.PrefixStore("cache_teacher", dist.distributed_c10d._get_default_store())
    total = sum(piece.n_tokens for piece in todo)

    def work_off() -> None:
        with progress_bar(total, "teacher", "token") as bar:
            while (number := store.add("next", 1) - 1) < len(todo):
                for n_targets in writer.write(todo[number]):
                    bar.update(min(store.add("done", n_targets), total) - bar.n)

    agreed(work_off)
    say(
        f"{writer.n_tokens:,} targets by rank 0: {writer.n_words / max(writer.n_tokens, 1):.1f} words and "
        f"{writer.n_bytes / max(writer.n_tokens, 1):.1f} bytes per token"
    )


def join_all(out: Path, every: Sequence[Piece], rank: int, world_size: int) -> None:
    """Joins the pieces of every shard that is not joined; each rank has its share of the shards."""
    shards = [list(of_shard) for _, of_shard in groupby(every, key=lambda piece: piece.shard)]

    def join_mine() -> None:
        for of_shard in shards[rank::world_size]:
            if not work.is_joined(out, of_shard[0]):
                work.join(out, of_shard)

    agreed(join_mine)
