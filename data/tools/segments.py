"""The first packed sequences of the stream, taken apart again: which document stands where, between which borders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fbitrain.data.config import DataConfig
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.data.tools.excerpt import excerpt

NEVER = 1 << 40  # sequences per step: no later phase of the mixture begins
CONTINUED, UNKNOWN = "(continued)", "(unknown)"
HEAD_CHARS, TAIL_CHARS = 70, 30


@dataclass(frozen=True)
class Segment:
    """What one document occupies of a sequence."""

    start: int  # its first token in the sequence
    token_ids: npt.NDArray[np.int64]  # [n], borders included
    origin: str  # source/shard:line (from 0; from the second pass on with #pass), or CONTINUED, or UNKNOWN


def first_sequences(
    data: DataConfig, tokenizer: Tokenizer, n: int
) -> Iterator[tuple[npt.NDArray[np.int64], list[str]]]:
    """The stream's first `n` sequences int64 [T+1], each with the documents that begin in it. Raises UserError."""
    from fbitrain.data.loader import TokenLoader  # imports torch, which takes seconds

    loader = TokenLoader(replace(data, n_workers=0), tokenizer, 0, 1, 1, sequences_per_step=NEVER, log_documents=True)
    with loader:
        for _ in range(n):
            batch = next(loader)
            yield batch[0].numpy(), loader.take_documents()


def segments(
    token_ids: npt.NDArray[np.int64], begun: Sequence[str], bos_id: int | None, eos_id: int | None
) -> list[Segment]:
    """Cuts a sequence where documents begin; `bos_id` and `eos_id` are None where the stream does not add them.

    `begun` names the documents that begin in it. Where their number does not fit the borders found, as with ready-made
    ids, which have none, or a text that holds the tokens itself, the origins are UNKNOWN.
    """
    is_start = np.zeros(len(token_ids), bool)
    is_start[1:] = True
    if bos_id is not None:
        is_start &= token_ids == bos_id
    if eos_id is not None:
        is_start[1:] &= token_ids[:-1] == eos_id
    starts = np.flatnonzero(is_start).tolist()
    if len(begun) == len(starts) + 1:  # nothing before a sequence tells whether a document begins with it
        origins = list(begun)
    else:
        origins = [CONTINUED, *begun] if len(begun) == len(starts) else [UNKNOWN] * (len(starts) + 1)
    pieces = np.split(token_ids, starts)
    return [Segment(*values) for values in zip([0, *starts], pieces, origins, strict=True)]


def describe(segment: Segment, tokenizer: Tokenizer, bos_id: int | None, eos_id: int | None) -> str:
    """Two lines: where it is and what it is of; its text with the borders written out."""
    inner: Any = segment.token_ids.tolist()
    before = after = ""
    if inner and inner[0] == bos_id:
        before, inner = "<BOS>", inner[1:]
    if inner and inner[-1] == eos_id:
        after, inner = "<EOS>", inner[:-1]
    text = excerpt(tokenizer.decode(inner), HEAD_CHARS, TAIL_CHARS)
    return (
        f"  {segment.start:>6,}  {len(segment.token_ids):>6,} tokens  {segment.origin}\n          {before}{text}{after}"
    )
