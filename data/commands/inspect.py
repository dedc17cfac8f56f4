"""Shows what a configuration would train on: its sources in numbers, first documents, and the first packed sequences.

`fbitrain data inspect config.yaml [section.key=value …] [--out DIR]`
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fbitrain.base.command import config_parser, natural, positive
from fbitrain.base.files import naming_unwritable
from fbitrain.data.config import DataConfig
from fbitrain.data.config_file import require_tokenizer
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.data.tools.length_plot import plot_lengths
from fbitrain.data.tools.parallel import n_cpus
from fbitrain.data.tools.segments import describe, first_sequences, segments
from fbitrain.data.tools.survey import Survey, survey
from fbitrain.data.tools.tables import human_bytes, table

PLOT = "lengths.png"


def source_table(surveys: Sequence[Survey]) -> str:
    """One line per source; ~ marks what is extrapolated."""
    weights = sum(of_source.source.weight for of_source in surveys)
    header = (
        "source",
        "share",
        "shards",
        "read",
        "documents",
        "text",
        "tokens",
        "tokens/byte",
        "median",
        "longest",
        "bad",
    )
    return table(header, [_cells(of_source, weights) for of_source in surveys])


def _cells(of_source: Survey, weights: float) -> list[str]:
    about = "" if of_source.is_complete else "~"
    about_tokens = "" if of_source.has_all_tokens else "~"
    lengths = of_source.lengths if len(of_source.lengths) else np.zeros(1, np.int64)
    unit = human_bytes if of_source.is_text else "{:,.0f} ids".format
    return [
        of_source.source.name,
        f"{of_source.source.weight / weights:.1%}",
        f"{len(of_source.shards):,}",
        f"{len(of_source.sizes):,}",
        f"{about}{of_source.documents:,.0f}",
        f"{about}{human_bytes(of_source.n_bytes)}" if of_source.is_text else "-",
        f"{about_tokens}{of_source.tokens:,.0f}",
        f"{of_source.tokens_per_byte:.3f}" if of_source.is_text else "-",
        unit(float(np.median(lengths))),
        unit(float(lengths.max())),
        f"{about}{of_source.bad_records:,.0f}",
    ]


def notes(surveys: Sequence[Survey], data: DataConfig) -> list[str]:
    """What one must know to read the table."""
    lines = ["tokens count BOS and EOS; tokens/byte does not."]
    if not all(of_source.is_complete for of_source in surveys):
        lines.append(
            "~ documents, text and bad records: in proportion to the bytes of the shards read (--shards 0: all)."
        )
    if not all(of_source.has_all_tokens for of_source in surveys):
        n_bytes = sum(of_source.read.sampled_bytes for of_source in surveys)
        lines.append(f"~ tokens: from {human_bytes(n_bytes)} of text tokenized (--sample-mb).")
    lines += [
        f"{of_source.source.name}: {of_source.read.foreign:,} of the sequences read hold ids beyond the vocabulary, "
        "which training counts as bad records; give the data.tokenizer that they were made with."
        for of_source in surveys
        if of_source.read.foreign
    ]
    if data.heldout_fraction or data.duplicates:
        lines.append("Documents that data.heldout_fraction and data.duplicates leave out are counted here.")
    return lines


def print_documents(surveys: Sequence[Survey]) -> None:
    print("\nFirst documents")
    for of_source in surveys:
        for first in of_source.first:
            length = human_bytes(first.length) if of_source.is_text else f"{first.length:,} ids"
            print(f"  {of_source.source.name}/{first.shard}:{first.line}  {length}\n          {first.excerpt}")


def print_sequences(data: DataConfig, tokenizer: Tokenizer, n: int) -> None:
    bos_id = tokenizer.bos_id if data.add_bos else None
    eos_id = tokenizer.eos_id if data.add_eos else None
    print("\nFirst packed sequences")
    for number, (token_ids, begun) in enumerate(first_sequences(data, tokenizer, n)):
        print(f"sequence {number}: {len(token_ids):,} tokens, {len(begun)} documents begin here")
        for segment in segments(token_ids, begun, bos_id, eos_id):
            print(describe(segment, tokenizer, bos_id, eos_id))


def parser() -> argparse.ArgumentParser:
    found = config_parser("fbitrain data inspect", "Shows what a configuration would train on.")
    found.add_argument("--out", type=Path, help=f"folder for {PLOT}, a histogram of the documents' lengths")
    found.add_argument("--documents", type=natural, default=2, help="first documents to show per source (default 2)")
    found.add_argument("--sequences", type=natural, default=2, help="packed sequences to show (default 2)")
    found.add_argument("--shards", type=natural, default=4, help="shards to read per source (default 4; 0: all)")
    found.add_argument("--sample-mb", type=positive, default=4, help="text to tokenize per source (default 4)")
    found.add_argument("--workers", type=positive, default=n_cpus(), help="processes that read shards")
    return found


def main(options: argparse.Namespace) -> None:
    data, tokenizer_path = require_tokenizer(options.config, options.overrides)
    # What is held out is not shown, and may not have been gathered yet.
    data = dataclasses.replace(data, heldout=[])
    tokenizer = load_tokenizer(tokenizer_path)
    if options.out:
        with naming_unwritable(options.out):  # before the minutes that reading may take
            options.out.mkdir(parents=True, exist_ok=True)
    surveys = survey(
        data,
        tokenizer_path,
        max_shards=options.shards,
        sample_bytes=options.sample_mb * 1_000_000,
        n_first=options.documents,
        n_workers=options.workers,
    )
    print(source_table(surveys), *notes(surveys, data), sep="\n")
    if options.out:
        with naming_unwritable(options.out / PLOT):
            plot_lengths(surveys, data.seq_len, options.out / PLOT)
        print(f"wrote {options.out / PLOT}")
    if options.documents:
        print_documents(surveys)
    if options.sequences:
        print_sequences(data, tokenizer, options.sequences)
