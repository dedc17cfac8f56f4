"""Calibration text: whether a configuration needs any, and its token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from fbitrain.base.errors import UserError
from fbitrain.config import Config
from fbitrain.data.loader import TokenLoader
from fbitrain.data.reading.heldout_text import read_documents
from fbitrain.data.streaming.stream import border_tokens
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.loading.pretrained_shape import is_binary_run


def needs_text(config: Config) -> bool:
    """Whether the start from model.pretrained depends on a text: salient weights chosen by it, or PTQ with feedback."""
    binarize, calibration = config.binarize, config.calibration
    if not config.model.pretrained or not binarize.enabled or not binarize.traits.salient:
        return False
    looks = binarize.salient.criterion != "magnitude" or (calibration.ptq and calibration.feedback)
    return looks and not is_binary_run(config.model.pretrained)


def calibration_ids(config: Config, tokenizer: Tokenizer) -> Tensor:
    """int64 [n_sequences, seq_len]: of calibration.path, else what a single reader draws first from the sources.

    Those are calibration.sources or data.sources, mixed and shuffled as `data` says, its phases left aside. A run reads
    them on data.n_lanes lanes, so its first batches are others.

    Raises UserError with what there is if that is less, or if it cannot be read.
    """
    calibration, data = config.calibration, config.data
    n, seq_len = calibration.n_sequences, calibration.seq_len or data.seq_len
    if calibration.path:
        borders = border_tokens(tokenizer, data.add_bos, data.add_eos)
        return read_calibration([calibration.path], tokenizer, n, seq_len, borders=borders)
    # One lane reads every source once before it begins anew: on more lanes a short one would repeat itself early.
    data = replace(data, seq_len=seq_len, n_lanes=1, n_workers=0, phases=[])
    if calibration.sources:
        data = replace(data, sources=calibration.sources, pretokenized="", duplicates="")
    sequences = []
    with TokenLoader(data, tokenizer, 0, 1, 1) as loader:
        for _ in range(n):
            sequences.append(next(loader)[:, :-1])
            if repeated := [name for name, epochs in loader.stats()["epochs"].items() if epochs]:
                raise UserError(
                    f"calibration asks for {n} sequences of {seq_len} tokens, but source {repeated[0]!r} ends in "
                    f"sequence {len(sequences)}; lower calibration.n_sequences or give more text"
                )
    return torch.cat(sequences)


def read_calibration(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    n_sequences: int,
    seq_len: int,
    *,
    borders: tuple[Sequence[int], Sequence[int]],
    text_key: str = "text",
) -> Tensor:
    """The first n_sequences · seq_len tokens of the shards or .txt files at `paths`, int64 [n_sequences, seq_len].

    Documents follow each other as in pretraining; `borders` are the tokens before and behind each (`border_tokens`). No
    more of the files is read than that takes. Raises UserError where they hold too little or cannot be read.
    """
    before, after = borders
    documents = read_documents(paths, "calibration", text_key)
    tokens = (token for text in documents for token in (*before, *tokenizer.encode(text), *after))
    return cut_sequences(tokens, n_sequences, seq_len, ", ".join(paths))


def cut_sequences(tokens: Iterable[int], n_sequences: int, seq_len: int, origin: str) -> Tensor:
    """The first tokens as int64 [n_sequences, seq_len]; UserError, which names the `origin`, if there are too few."""
    needed = n_sequences * seq_len
    ids = torch.tensor(list(islice(tokens, needed)), dtype=torch.int64)
    if len(ids) < needed:
        raise UserError(
            f"calibration asks for {n_sequences} sequences of {seq_len} tokens, but {origin} holds {len(ids)} tokens "
            f"in all, enough for {len(ids) // seq_len}; give more text or a smaller calibration.n_sequences"
        )
    return ids.view(n_sequences, seq_len)
