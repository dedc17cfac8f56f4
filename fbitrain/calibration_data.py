"""The text that a selection pass looks at: the first sequences of some files, tokenized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice

import torch
from torch import Tensor

from fbitrain.data.reading.heldout_text import read_documents
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.errors import UserError


def read_calibration(
    paths: Sequence[str], tokenizer: Tokenizer, n_sequences: int, seq_len: int, text_key: str = "text"
) -> Tensor:
    """The first n_sequences · seq_len tokens of the shards or .txt files at `paths`, int64 [n_sequences, seq_len].

    Documents follow each other as in pretraining, BOS and EOS around each (where the tokenizer has them); no more of
    the files is read than that takes. Raises UserError where they hold too little, DataError if they cannot be read.
    """
    tokens = _tokens(read_documents(paths, "calibration", text_key), tokenizer)
    return cut_sequences(tokens, n_sequences, seq_len, ", ".join(paths))


def cut_sequences(tokens: Iterable[int], n_sequences: int, seq_len: int, source: str) -> Tensor:
    """The first tokens as int64 [n_sequences, seq_len]; UserError, which names the `source`, if there are too few."""
    needed = n_sequences * seq_len
    ids = torch.tensor(list(islice(tokens, needed)), dtype=torch.int64)
    if len(ids) < needed:
        raise UserError(
            f"calibration asks for {n_sequences} sequences of {seq_len} tokens, but {source} holds {len(ids)} tokens "
            f"in all, enough for {len(ids) // seq_len}; give more text or a smaller calibration.n_sequences"
        )
    return ids.view(n_sequences, seq_len)


def _tokens(documents: Iterable[str], tokenizer: Tokenizer) -> Iterator[int]:
    bos, eos = ([] if id is None else [id] for id in (tokenizer.bos_id, tokenizer.eos_id))
    for document in documents:
        yield from chain(bos, tokenizer.encode(document), eos)
