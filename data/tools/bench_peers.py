"""The peers of the stream's benchmark: other libraries doing the same work, each if it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fbitrain.data.config import DataConfig
from fbitrain.data.loader import TokenLoader
from fbitrain.data.streaming.plan import find_sources
from fbitrain.data.streaming.stream import border_tokens
from fbitrain.data.tokenizer import Tokenizer

N_SEQUENCES = 20_000  # written for a peer to read, again and again
Round = Callable[[], tuple[int, float]]  # does some work; returns tokens and seconds
Sequences = npt.NDArray[np.int64]  # [n, T+1]


def timed(counts: Callable[[], Iterator[int]], n_tokens: int) -> Iterator[Round]:
    """Rounds of `n_tokens` over an endless succession of `counts()`, the tokens of one text or batch after another."""
    endless = itertools.chain.from_iterable(iter(counts, None))
    while True:
        yield lambda: take(endless, n_tokens)


def take(counts: Iterator[int], n_tokens: int) -> tuple[int, float]:
    """Goes on until `counts` add up to `n_tokens`; returns their sum, and the seconds that took."""
    done, started = 0, time.perf_counter()
    while done < n_tokens:
        done += next(counts)
    return done, time.perf_counter() - started


def datasets_text(data: DataConfig, tokenizer: Tokenizer, batch_size: int, n_tokens: int) -> Iterator[Round]:
    """`datasets` streaming the same files, one after another, tokenized and packed by hand as its users do."""
    if importlib.util.find_spec("datasets") is None:
        return
    import datasets

    datasets.disable_progress_bars()
    files = [shard.path for shards in find_sources(data).values() for shard in shards]
    before, after = border_tokens(tokenizer, data.add_bos, data.add_eos)

    def batches() -> Iterator[int]:
        stream = datasets.load_dataset("json", data_files=files, split="train", streaming=True).select_columns(["text"])
        size = batch_size * (data.seq_len + 1)
        ids: list[int] = []
        for record in stream:
            ids += [*before, *tokenizer.encode(record["text"]), *after]
            while len(ids) >= size:
                yield torch.tensor(ids[:size], dtype=torch.int64).view(batch_size, -1).numel()
                ids = ids[size:]

    yield from timed(batches, n_tokens)


def litdata_tokens(scratch: Path, loader: TokenLoader, length: int, batch_size: int, n_tokens: int) -> Iterator[Round]:
    """litdata's TokensLoader over the same sequences."""
    if importlib.util.find_spec("litdata") is None:
        return
    from litdata import StreamingDataset, TokensLoader
    from litdata.streaming.writer import BinaryWriter

    folder = scratch / "litdata"
    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes=64_000_000, item_loader=TokensLoader())
    for i, sequence in enumerate(sequences_of(loader, length)):
        writer[i] = torch.from_numpy(sequence.astype(np.uint16))
    writer.done()
    writer.merge()

    def batches() -> Iterator[int]:
        items: list[torch.Tensor] = []
        for item in StreamingDataset(str(folder), item_loader=TokensLoader(block_size=length), shuffle=False):
            items.append(item)
            if len(items) == batch_size:
                yield torch.stack(items).to(torch.int64).numel()
                items = []

    yield from timed(batches, n_tokens)


def sequences_of(loader: TokenLoader, length: int) -> Iterator[Sequences]:
    """Sequences int64 [T+1] for a peer to store."""
    for _, batch in zip(range(-(-N_SEQUENCES * 257 // length) // 8), loader, strict=False):
        yield from batch.numpy()


TextPeer = Callable[[DataConfig, Tokenizer, int, int], Iterator[Round]]
TokensPeer = Callable[[Path, TokenLoader, int, int, int], Iterator[Round]]
PEERS_OF_TEXT: dict[str, TextPeer] = {"datasets streaming": datasets_text}
PEERS_OF_TOKENS: dict[str, TokensPeer] = {"litdata": litdata_tokens}
