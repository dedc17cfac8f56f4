"""The tokenizer of a GGUF release, as llama.cpp reads it: byte-level BPE, and SentencePiece models of LLaMA's kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from fbitrain.base.errors import UserError
from fbitrain.data.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from fbitrain.loading.tokenizer_folder import PROBES, pad_id


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, vocab_size: int, *, add_bos: bool) -> None:
    """Adds the run's tokenizer, its vocabulary padded to `vocab_size` with tokens that text never gives.

    Raises UserError for a tokenizer of another kind.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        tokens, types = _add_sentencepiece(writer, tokenizer, vocab_size)
    else:
        assert isinstance(tokenizer, HFTokenizer)
        tokens, types = _add_byte_level(writer, tokenizer)
    for token_id in range(len(tokens), vocab_size):
        tokens.append(f"[PAD{token_id}]")
        types.append(TokenType.UNUSED)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    if tokenizer.eos_id is not None:
        writer.add_eos_token_id(tokenizer.eos_id)
    if (padding := pad_id(tokenizer)) is not None:
        writer.add_pad_token_id(padding)
    writer.add_add_bos_token(add_bos and tokenizer.bos_id is not None)
    writer.add_add_eos_token(False)  # it would end every prompt
    writer.add_add_space_prefix(isinstance(tokenizer, SentencePieceTokenizer))


def check_tokenizer(path: Path, trained: Tokenizer) -> None:
    """Raises UserError if byte-level BPE in the GGUF file `path` gives other ids than `trained`."""
    if isinstance(trained, HFTokenizer):
        written = load_tokenizer(path)
        if any(written.encode(text) != trained.encode(text) for text in PROBES):
            raise _not_writable(trained.path)


def _not_writable(path: str) -> UserError:
    return UserError(
        f"tokenizer {path} is of a kind that cannot be written as GGUF (it must be byte-level BPE that cuts text as "
        "GPT-2 or SmolLM does, or a SentencePiece model); release as dense or packed"
    )


def _add_sentencepiece(
    writer: gguf.GGUFWriter, tokenizer: SentencePieceTokenizer, vocab_size: int
) -> tuple[list[str], list[int]]:
    model = tokenizer.model
    kinds = (
        (model.is_unknown, TokenType.UNKNOWN),
        (model.is_control, TokenType.CONTROL),
        (model.is_unused, TokenType.UNUSED),
        (model.is_byte, TokenType.BYTE),
        (lambda _: True, TokenType.NORMAL),
    )
    ids = range(model.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([model.get_score(i) for i in ids] + [0.0] * (vocab_size - len(ids)))
    return [model.id_to_piece(i) for i in ids], [next(kind for holds, kind in kinds if holds(i)) for i in ids]


def _add_byte_level(writer: gguf.GGUFWriter, tokenizer: HFTokenizer) -> tuple[list[str], list[int]]:
    definition = json.loads(tokenizer.backend.to_str())
    cutting = _cutting(definition)
    if cutting is None:
        raise _not_writable(tokenizer.path)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cutting)
    merges = definition["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    pieces = {token_id: token for token, token_id in tokenizer.backend.get_vocab(with_added_tokens=True).items()}
    tokens = [pieces.get(token_id, f"[PAD{token_id}]") for token_id in range(tokenizer.vocab_size)]
    types = [TokenType.NORMAL if token_id in pieces else TokenType.UNUSED for token_id in range(len(tokens))]
    for token_id, added in tokenizer.backend.get_added_tokens_decoder().items():
        types[token_id] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return tokens, [int(kind) for kind in types]


def _cutting(definition: dict[str, Any]) -> str | None:
    """llama.cpp's name (tokenizer.ggml.pre) for how a tokenizer.json's byte-level BPE cuts text; None if unknown."""
    if definition["model"]["type"] != "BPE" or definition.get("normalizer"):
        return None
    cutter = definition.get("pre_tokenizer") or {}
    steps = cutter.get("pretokenizers", [cutter])
    if not steps[-1].get("use_regex") or steps[-1].get("add_prefix_space") or steps[-1].get("type") != "ByteLevel":
        return None
    digits = [{"type": "Digits", "individual_digits": True}]
    return {0: "gpt-2", 1: "smollm" if steps[:-1] == digits else None}.get(len(steps) - 1)
