"""Trains a SentencePiece tokenizer with LLaMA-2's settings on a corpus of our own.

`fbitrain data train-tokenizer --vocab-size 32000 --out tokenizer.model SHARDS…` samples documents evenly over
the shards and gives a BPE with byte fallback, unk 0, bos 1, eos 2. The same shards and options give the same file.
"""

from __future__ import annotations

import argparse
import io
import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from tqdm import tqdm

from fbitrain.base.command import natural, positive
from fbitrain.base.errors import UserError
from fbitrain.base.files import require_writable, write_anywhere
from fbitrain.data.config import DataConfig
from fbitrain.data.reading.documents import START, BadRecord, Document
from fbitrain.data.reading.records import RecordFormat, decode, read_entries
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.sources.shards import SHARD_SUFFIXES, Shard, find_files
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.data.tools.tables import human_bytes

logger = logging.getLogger(__name__)

# As tokenizer.model of LLaMA-2 states them.
LLAMA_SETTINGS = {
    "model_type": "bpe",
    "character_coverage": 0.99995,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "unk_surface": " \u2047 ",
    **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1},
}
MAX_LINE_CHARS = 1024  # SentencePiece passes over lines of more than 4192 bytes; longer ones are given in pieces
# Text in a byte of a shard: a guess that decides how many records are passed over, not how much is taken.
EXPANSION = {".gz": 3.0, ".zst": 3.5, ".parquet": 2.0}
N_THREADS = 16  # on every machine: the number is written into the model
TOO_LARGE = re.compile(r"<= (\d+)")


@dataclass(frozen=True)
class Sampling:
    """Which documents are trained on."""

    text_key: str
    max_bytes: int  # of text, over all shards
    seed: int


def train(shards: Sequence[Shard], vocab_size: int, sampling: Sampling, cache: ShardCache) -> bytes:
    """A trained SentencePiece model, serialized. Raises UserError where the shards do not suffice for it."""
    lines = [line for text in sample_texts(shards, sampling, cache) for line in _lines(text)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            num_threads=N_THREADS,
            minloglevel=2,
            **LLAMA_SETTINGS,
        )
    except RuntimeError as error:
        raise UserError(_reason(str(error), vocab_size)) from None
    return model.getvalue()


def sample_texts(shards: Sequence[Shard], sampling: Sampling, cache: ShardCache) -> Iterator[str]:
    """Texts of at most `sampling.max_bytes` UTF-8 bytes together, the same share of each shard that has enough.

    Of a shard every n-th record is taken, so that all of it is represented. Shards go from the smallest to the largest:
    what one leaves of its share falls to those after it. Raises UserError where there is no text to be taken.
    """
    left = sampling.max_bytes
    too_large: list[int] = []  # bytes of the documents that ended a shard's share
    with tqdm(total=left, unit="B", unit_scale=True, desc="reading", disable=None) as bar:
        for i, shard in enumerate(sorted(shards, key=lambda shard: (shard.size, shard.name))):
            share = left // (len(shards) - i)
            for document in _drawn(shard, share, sampling, cache):
                if document.n_bytes > share:
                    too_large.append(document.n_bytes)
                    break
                yield document.text
                share -= document.n_bytes
                left -= document.n_bytes
                bar.update(document.n_bytes)
    if left == sampling.max_bytes:
        raise UserError(_nothing_taken(shards, sampling, too_large))


def _drawn(shard: Shard, share: int, sampling: Sampling, cache: ShardCache) -> Iterator[Document]:
    """Every n-th document of `shard`, so many that they have about `share` bytes together."""
    format = RecordFormat("text", sampling.text_key)
    with cache.open(shard) as opened:
        text_bytes = opened.n_bytes * EXPANSION.get(Path(opened.path).suffix, 1.0)
        n_parts = max(1, int(text_bytes / max(share, 1)))
        part = random.Random(f"{sampling.seed}/{shard.name}").randrange(n_parts)
        for entry in read_entries(opened.path, format, START, part, n_parts):
            found = entry if isinstance(entry, BadRecord) else decode(entry, format, shard.path)
            if isinstance(found, BadRecord):
                logger.warning("skipped %s", found)
            else:
                yield found


def _nothing_taken(shards: Sequence[Shard], sampling: Sampling, too_large: Sequence[int]) -> str:
    where = shards[0].path + (f" and {len(shards) - 1} more shards" if len(shards) > 1 else "")
    if too_large:
        return (
            f"no document drawn from {where} fits into its shard's share of {human_bytes(sampling.max_bytes)}: the "
            f"smallest has {human_bytes(min(too_large))}; give a larger --max-mb"
        )
    return (
        f"the records drawn from {where} hold no text under {sampling.text_key!r}; correct --text-key or the shards, "
        "or give a larger --max-mb, which draws more of them"
    )


def _lines(text: str) -> Iterator[str]:
    """What SentencePiece takes for sentences. It passes over those with a NUL, which is a byte token in any case."""
    for line in text.replace("\0", " ").split("\n"):
        for start in range(0, len(line), MAX_LINE_CHARS):
            yield line[start : start + MAX_LINE_CHARS]


def _reason(message: str, vocab_size: int) -> str:
    """One sentence for what SentencePiece says of a corpus."""
    if limit := TOO_LARGE.search(message):
        return (
            f"the text is too small for --vocab-size {vocab_size}: it gives at most {limit[1]} tokens; "
            "give more shards, a larger --max-mb, or a smaller vocabulary"
        )
    if "required_chars" in message:
        return (
            f"--vocab-size {vocab_size} has no room for the characters of the text and 256 bytes "
            f"({message.rsplit('. ', 1)[-1].strip()}); give a larger one"
        )
    return f"SentencePiece cannot train on this text ({message})"


def main(options: argparse.Namespace) -> None:
    out: Path = options.out
    if out.suffix != ".model":
        raise UserError(f"--out {out} must end in .model, by which a SentencePiece tokenizer is known")
    require_writable(out, "--out", makes_folders=True)
    shards = find_files(options.shards, "the training text", SHARD_SUFFIXES)
    sampling = Sampling(options.text_key, options.max_mb * 1_000_000, options.seed)
    cache = ShardCache(options.cache_dir, int(DataConfig.cache_gb * 1e9))
    model = train(shards, options.vocab_size, sampling, cache)
    write_anywhere(out, model)
    tokenizer = load_tokenizer(out)
    print(f"{out}: {tokenizer.vocab_size} tokens, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="fbitrain data train-tokenizer", description=__doc__)
    found.add_argument("shards", nargs="+", help=f"files, folders, globs or URLs of {', '.join(SHARD_SUFFIXES)}")
    found.add_argument("--out", type=Path, required=True, help="the file to write, e.g. tokenizer.model")
    found.add_argument("--vocab-size", type=positive, default=32000, help="with 3 special tokens and 256 bytes")
    found.add_argument("--max-mb", type=positive, default=200, help="of text to train on; all of it is held in memory")
    found.add_argument("--seed", type=natural, default=0, help="which records are taken")
    found.add_argument("--text-key", default="text", help="the field or column that holds the text")
    found.add_argument("--cache-dir", default=DataConfig.cache_dir, help="where remote shards are kept")
    return found
