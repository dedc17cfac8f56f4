"""How many bytes of a text each of its tokens stands for, read off the vocabulary; part of a character counts too.

A second tokenization with offsets would tell it as well, but offsets are in whole characters, take the memory of long
texts that data.long_text avoids, and are left out by the fast form of the `tokenizers` library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fbitrain.data.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer
from fbitrain.data.tokenizing.seams import BYTE_TOKEN, SPACE


def bytes_of_tokens(token_ids: Sequence[int], n_bytes: int, tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """UTF-8 bytes of each token [n] of a text of `n_bytes`, which is their sum.

    What SentencePiece puts before a text counts for nothing. Where the vocabulary does not tell a text's bytes (it was
    normalized, or has characters that are unknown), the difference is spread over all tokens.
    """
    ends = np.cumsum(_vocabulary_bytes(tokenizer)[np.asarray(token_ids, dtype=np.int64)])
    if len(ends):
        # Rounded down, one byte too many, as SentencePiece's first space is, is taken from the first token alone.
        ends = ends * n_bytes // ends[-1]
    found: npt.NDArray[np.int64] = np.diff(ends, prepend=0)
    return found


def _vocabulary_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Bytes that each id [V] stands for; an id without a token stands for one."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = tokenizer.model
        return np.array([_piece_bytes(model.id_to_piece(i), model.is_byte(i)) for i in range(model.get_piece_size())])
    assert isinstance(tokenizer, HFTokenizer)
    backend = tokenizer.backend
    definition = json.loads(backend.to_str())
    byte_level = "ByteLevel" in _types(definition["decoder"]) | _types(definition["pre_tokenizer"])
    byte_fallback = bool(definition["model"].get("byte_fallback"))
    lengths = np.ones(tokenizer.vocab_size, dtype=np.int64)
    for piece, i in backend.get_vocab(with_added_tokens=False).items():  # GPT-2's alphabet writes a byte as a letter
        lengths[i] = len(piece) if byte_level else _piece_bytes(piece, byte_fallback)
    for i, token in backend.get_added_tokens_decoder().items():
        lengths[i] = len(token.content.encode())
    return np.maximum(lengths, 1)


def _piece_bytes(piece: str, may_be_byte: bool) -> int:
    return 1 if may_be_byte and BYTE_TOKEN.fullmatch(piece) else len(piece.replace(SPACE, " ").encode())


def _types(step: Any) -> set[str]:
    """The types of a step of a tokenizer.json, and of the steps that a sequence consists of."""
    if isinstance(step, dict):
        return {str(step.get("type"))}.union(*map(_types, step.values()))
    return set().union(*map(_types, step)) if isinstance(step, list) else set()
