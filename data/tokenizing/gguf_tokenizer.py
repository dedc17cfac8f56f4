"""The tokenizer inside a GGUF file, built from the file's header alone.

The `gguf` package maps every tensor and copies every string before it answers (seconds); a tokenizer process needs the
header only (a fraction of a second). Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, BinaryIO

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from fbitrain.base.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had 32-bit counts
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# tokenizer.ggml.pre: does the model see every digit on its own? (llama.cpp, src/llama-vocab.cpp)
SPLITS_DIGITS = {"smollm": True, "gpt-2": False}
MANY_BYTES = 1 << 20  # more of them are compared with what the file has left, before memory is asked for


class TokenType(IntEnum):
    """Values of tokenizer.ggml.token_type that matter here."""

    CONTROL = 3
    USER_DEFINED = 4


def read_metadata(path: str, prefix: str) -> dict[str, Any]:
    """The key-value pairs of the GGUF file `path` whose key starts with `prefix`. Raises UserError."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise UserError(f"tokenizer {path} is not a GGUF file; fetch it again")
            version, _n_tensors, n_pairs = struct.unpack("<IQQ", _exactly(file, 20))
            if version not in VERSIONS:
                raise UserError(f"tokenizer {path} is GGUF version {version}; versions 2 and 3 can be read")
            pairs = {}
            for _ in range(n_pairs):
                key = _string(file)
                value = _value(file, _scalar(file, "I"))
                if key.startswith(prefix):
                    pairs[key] = value
            return pairs
    except (OSError, EOFError, UnicodeDecodeError, KeyError, RecursionError) as error:
        raise UserError(f"tokenizer {path} is damaged ({error!r}); fetch it again") from None


def build_bpe(path: str) -> tuple[Tokenizer, int | None, int | None]:
    """The byte-level BPE tokenizer of GGUF file `path`, with its BOS and EOS ids. Raises UserError.

    transformers' own conversion knows nothing of tokenizer.ggml.pre and so leaves out the splitting of digits that
    SmolLM2 was trained with: a number after several spaces then gets tokens the model never saw there.
    """
    data = read_metadata(path, "tokenizer.ggml.")
    kind, pre = data.get("tokenizer.ggml.model"), data.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in SPLITS_DIGITS:
        raise UserError(
            f"tokenizer {path} is of kind {kind}/{pre}; of GGUF tokenizers only gpt2 with {' or '.join(SPLITS_DIGITS)} "
            "can be read: give the model's folder with its tokenizer.json instead"
        )
    tokens, merges = (_strings(data, f"tokenizer.ggml.{name}", path) for name in ("tokens", "merges"))
    tokenizer = Tokenizer(_bpe(tokens, merges, path))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if SPLITS_DIGITS[pre]:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    else:
        tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    _add_special(tokenizer, tokens, data.get("tokenizer.ggml.token_type", []))
    bos_id, eos_id = (data.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
    if data.get("tokenizer.ggml.add_bos_token") is True and isinstance(bos_id, int) and 0 <= bos_id < len(tokens):
        start = tokens[bos_id]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[start, "$A"], pair=[start, "$A", start, "$B"], special_tokens=[(start, bos_id)]
        )
    return tokenizer, bos_id, eos_id


def _strings(data: dict[str, Any], key: str, path: str) -> list[str]:
    found = data.get(key)
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise UserError(f"tokenizer {path} has no list of strings {key}; fetch it again, or give the model's folder")
    return found


def _bpe(tokens: Sequence[str], merges: Sequence[str], path: str) -> models.BPE:
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        return models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs)
    except Exception as error:
        # The library raises bare Exception for merges of what are no tokens.
        raise UserError(f"tokenizer {path} is damaged ({error}); fetch it again") from None


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    typed = list(zip(tokens, types, strict=False))
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token, type_ in typed if type_ == TokenType.CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, type_ in typed if type_ == TokenType.USER_DEFINED]
    )


def _exactly(file: BinaryIO, n_bytes: int) -> bytes:
    left = os.fstat(file.fileno()).st_size - file.tell() if n_bytes > MANY_BYTES else n_bytes
    data = file.read(min(n_bytes, left))
    if len(data) != n_bytes:
        raise EOFError("it ends in the middle of its header")
    return data


def _scalar(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", _exactly(file, struct.calcsize(f"<{code}")))[0]


def _string(file: BinaryIO) -> str:
    return _exactly(file, _scalar(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, type_: int) -> Any:
    if type_ == STRING:
        return _string(file)
    if type_ == ARRAY:
        item_type, n = _scalar(file, "I"), _scalar(file, "Q")
        if item_type in SCALARS:
            code = SCALARS[item_type]
            return list(struct.unpack(f"<{n}{code}", _exactly(file, n * struct.calcsize(f"<{code}"))))
        return [_value(file, item_type) for _ in range(n)]
    return _scalar(file, SCALARS[type_])
