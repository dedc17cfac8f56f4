"""Tokenizes the corpus of a configuration once, into shards that training maps into memory (data.pretokenized).

Killed at any moment it goes on when it is run again: a shard counts as finished when its report is there, which is
written last. The format is in fbitrain.data.pretokenized.token_shards.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fbitrain.base.command import config_parser, positive
from fbitrain.data.config import DataConfig
from fbitrain.data.config_file import require_tokenizer
from fbitrain.data.pretokenized.token_folder import Target, TokenFolder
from fbitrain.data.pretokenized.token_jobs import Job, join_parts, tokenize_part
from fbitrain.data.pretokenized.token_shards import REPORT, ShardReport, read_report, sizes_differ, with_ending
from fbitrain.data.pretokenized.token_writer import damage
from fbitrain.data.streaming.plan import Unit, cut, record_format
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.data.tools.corpus import text_shards
from fbitrain.data.tools.parallel import in_processes, n_cpus
from fbitrain.data.tools.progress import COMPRESSION, ProgressBar
from fbitrain.data.tools.tables import human_bytes, table

PROGRESS = ".progress.tmp"
HEADER = ["source", "shards", "documents", "text", "tokens", "bytes/token", "bad"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """What one process tokenizes at a time: a shard, or a part of a large one."""

    target: Target
    unit: Unit

    @property
    def path(self) -> Path:
        return self.target.part(self.unit.part, self.unit.n_parts)


def pretokenize(
    data: DataConfig, tokenizer_path: str, out: Path, n_workers: int, verify: bool = False
) -> dict[str, list[ShardReport]]:
    """Brings `out` up to date with the shards of `data.sources` and returns their reports, by source.

    What is finished stays, after a look at the sizes of its files (`verify`: at every byte); the rest is made. Raises
    UserError if `out` was made with another tokenizer, of other shards or fields, or holds something else.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    folder = TokenFolder(out, tokenizer.fingerprint, dtype)
    shards = text_shards(data)
    targets = [
        folder.target(source.name, record_format(source), shard)
        for source in data.sources
        for shard in shards[source.name]
    ]
    with folder.claimed():
        folder.require_same_origin(targets)
        if verify:
            _disown_damaged(targets, n_workers)
        whole = {target.path for target in targets if _is_finished(target, target.path)}
        pieces = cut_targets(targets, n_workers)
        todo = _unfinished(pieces, whole)
        kept = _size(pieces) - _size(todo)
        ratio = 1.0 if all(target.shard.path.endswith(".jsonl") for target in targets) else COMPRESSION
        with ProgressBar(out / PROGRESS, [piece.unit.size for piece in todo], kept, "tokenizing", ratio) as bar:
            _each(tokenize_part, _jobs(todo, data, tokenizer_path, dtype, bar, n_workers), n_workers)
        _each(join_parts, _divided(pieces, whole), n_workers)
        return folder.finish(targets)


def cut_targets(targets: Sequence[Target], n_workers: int) -> list[Piece]:
    """Pieces of about equal size, as lanes are cut, so that no process is left with a large shard in the end.

    They depend on all shards and the number of processes: what a killed run had finished of them fits the next run.
    """
    pieces = []
    n_begun = 0
    for unit in cut([target.shard for target in targets], n_workers):
        n_begun += unit.part == 0
        pieces.append(Piece(targets[n_begun - 1], unit))
    return pieces


def _is_finished(target: Target, path: Path) -> bool:
    """Whether the files that begin with `path`, of all of the target's shard or of a part, are there and whole.

    What was lost of a shard may be there today: such a one is never finished.
    """
    report = read_report(path)
    if report is None or report.lost or target.change_since(report):
        return False
    if wrong := sizes_differ(path, report):
        logger.warning("%s; made anew", wrong)
    return not wrong


def _unfinished(pieces: Sequence[Piece], whole: Set[Path]) -> list[Piece]:
    """The pieces of shards that are not `whole`, but for parts that a killed run had finished.

    Where one part of a shard could not be read to its end, the others ended there too, and say nothing of it.
    """
    lost = {piece.target.path for piece in pieces if (report := read_report(piece.path)) and report.lost}
    return [
        piece
        for piece in pieces
        if piece.target.path not in whole
        and (piece.unit.n_parts == 1 or piece.target.path in lost or not _is_finished(piece.target, piece.path))
    ]


def _disown_damaged(targets: Sequence[Target], n_workers: int) -> None:
    """Looks at every byte of what is finished. What has lost its report is not finished any more."""
    paths = [target.path for target in targets if _is_finished(target, target.path)]
    checked = in_processes(damage, paths, n_workers)
    for path, wrong in zip(paths, tqdm(checked, "verifying", len(paths), unit="shard"), strict=True):
        if wrong:
            logger.warning("%s; made anew", wrong)
            with_ending(path, REPORT).unlink()


def _jobs(
    todo: Sequence[Piece], data: DataConfig, tokenizer_path: str, dtype: str, bar: ProgressBar, n_workers: int
) -> list[Job]:
    """The largest first."""
    order = sorted(range(len(todo)), key=lambda i: -todo[i].unit.size)
    ahead = [todo[i].unit.shard for i in order[n_workers:]] + [None] * n_workers
    return [
        Job(
            shard=todo[i].unit.shard,
            format=todo[i].target.format,
            part=todo[i].unit.part,
            n_parts=todo[i].unit.n_parts,
            target=todo[i].path,
            dtype=dtype,
            tokenizer_path=tokenizer_path,
            cache_dir=data.cache_dir,
            cache_bytes=data.cache_bytes,
            max_bad_records=data.max_bad_records,
            progress=bar.slot(i),
            ahead=next_shard,
        )
        for i, next_shard in zip(order, ahead, strict=False)
    ]


def _divided(pieces: Sequence[Piece], whole: Set[Path]) -> list[tuple[Path, tuple[Path, ...]]]:
    """The shards still to be joined, and their parts."""
    parts: dict[Path, list[Path]] = {}
    for piece in pieces:
        if piece.unit.n_parts > 1 and piece.target.path not in whole:
            parts.setdefault(piece.target.path, []).append(piece.path)
    return [(path, tuple(found)) for path, found in parts.items()]


def _size(pieces: Sequence[Piece]) -> float:
    return sum(piece.unit.size for piece in pieces)


def _each(work: Callable[[Any], None], jobs: Sequence[Any], n_workers: int) -> None:
    for _ in in_processes(work, jobs, n_workers):
        pass


def summary(reports: Mapping[str, Sequence[ShardReport]]) -> str:
    """A table of what the sources became, and the shards that could not be read to their end."""
    rows = []
    for source, of_source in reports.items():
        n_documents, n_tokens, n_bytes, n_records = (
            sum(getattr(report, name) for report in of_source)
            for name in ("n_documents", "n_tokens", "n_bytes", "n_records")
        )
        per_token = f"{n_bytes / n_tokens:.2f}" if n_tokens else "-"
        rows.append(
            [
                source,
                f"{len(of_source):,}",
                f"{n_documents:,}",
                human_bytes(n_bytes),
                f"{n_tokens:,}",
                per_token,
                f"{n_records - n_documents:,}",
            ]
        )
    lost = [
        f"{report.path}, line {report.lost[0] + 1}: {report.lost[1]}"
        for of_source in reports.values()
        for report in of_source
        if report.lost
    ]
    return "\n".join([table(HEADER, rows), *lost])


def parser() -> argparse.ArgumentParser:
    found = config_parser("fbitrain data pretokenize", __doc__.splitlines()[0])
    found.add_argument("--out", type=Path, required=True, help="folder for the shards; run again, it is completed")
    found.add_argument("--workers", type=positive, default=n_cpus(), help="processes (default: one per CPU)")
    found.add_argument("--verify", action="store_true", help="check the sha256 of what is finished, not only its size")
    return found


def main(options: argparse.Namespace) -> None:
    logging.basicConfig(format="%(message)s")
    data, tokenizer_path = require_tokenizer(options.config, options.overrides)
    print(summary(pretokenize(data, tokenizer_path, options.out, options.workers, options.verify)))
    print(f"finished; train on it with data.pretokenized={options.out}")
