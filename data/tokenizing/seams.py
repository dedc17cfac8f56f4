"""Where a text may be cut for a given tokenizer, read off its definition; unknown kinds are never cut.

Two kinds are known. Byte-level BPEs (GPT-2's, SmolLM2's, Qwen2's) cut text into words by a regular expression; between
words, and inside long runs of ASCII letters, it may be cut. SentencePiece's BPEs (LLaMA-2's) have no words: every
place between two tokens is a candidate, and a character that is part of no longer token stands in for the beginning
of the text, so that the space which belongs there alone is not put before every piece.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import sentencepiece

from fbitrain.data.tokenizing.long_text import UNKNOWN_LENGTH, Seams

SPACE = "\u2581"  # SentencePiece's visible space
SEPARATOR = "\n"
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
# Before spaces, and behind a lone newline. Of WORD_PATTERNS no match goes over such a place, none before it ends
# elsewhere for what follows, none behind it looks back. (o200k's would take a "/" along with the newline.)
SAFE_CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\s/])")
# Farther from a run's beginning than any contraction ('ll, 've) reaches.
IN_WORD = re.compile(r"(?<=[A-Za-z]{16})(?=[A-Za-z])")
ASCII_WORD = re.compile("[A-Za-z]+")
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}|{OTHERS}",  # Qwen2
    rf"{CONTRACTIONS}|{WORD}|\p{{N}}{{1,3}}|{OTHERS}",  # GPT-4
}
PLAIN_PIECES = {1, 2, 3, 6}  # SentencePiece's normal, unknown, control, byte; no user-defined, no unused ones
SENTENCEPIECE_BPE = 2


def byte_level_seams(definition: dict[str, Any], encode: Callable[[str], list[int]]) -> Seams | None:
    """For a tokenizer.json of a byte-level BPE whose words are cut by a known pattern; None for any other."""
    steps = _steps(definition["pre_tokenizer"])
    while steps and steps[0]["type"] == "Digits":
        steps = steps[1:]
    byte_level = steps[-1] if steps else {}
    if byte_level.get("type") != "ByteLevel" or byte_level["add_prefix_space"]:
        return None
    splits = steps[:-1]
    if byte_level.get("use_regex", True) == bool(splits) or not all(map(_is_known_split, splits)) or len(splits) > 1:
        return None
    if not _is_plain_bpe(definition) or (definition["normalizer"] or {}).get("type", "NFC") != "NFC":
        return None
    words = [token if ASCII_WORD.fullmatch(token) else "" for token in _tokens(definition)]
    lengths = [len(word) or UNKNOWN_LENGTH for word in words]
    return Seams(encode, words, lengths, SAFE_CUT, IN_WORD)


def metaspace_seams(definition: dict[str, Any], encode: Callable[[str], list[int]]) -> Seams | None:
    """For a tokenizer.json made of a SentencePiece BPE, in its older and its newer form; None for any other."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    old = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    new = {"type": "Metaspace", "replacement": SPACE, "split": False}
    normalizer, pre_tokenizer = definition["normalizer"], definition["pre_tokenizer"]
    is_old = normalizer == old and pre_tokenizer is None
    is_new = normalizer is None and {**(pre_tokenizer or {}), **new} == pre_tokenizer
    if not (is_old or is_new) or not _is_plain_bpe(definition) or not definition["model"].get("byte_fallback"):
        return None
    special = {token["content"] for token in definition["added_tokens"]} | {definition["model"].get("unk_token")}
    return _spaced_seams([token if token not in special else None for token in _tokens(definition)], encode)


def sentencepiece_seams(model: sentencepiece.SentencePieceProcessor) -> Seams | None:
    """For a SentencePiece BPE with byte fallback that normalizes nothing, as LLaMA-2's; None for any other."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model.serialized_model_proto())
    normalizer, trainer = proto.normalizer_spec, proto.trainer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or trainer.treat_whitespace_as_suffix:
        return None
    if not normalizer.escape_whitespaces or trainer.model_type != SENTENCEPIECE_BPE or not trainer.byte_fallback:
        return None
    if not {piece.type for piece in proto.pieces} <= PLAIN_PIECES:
        return None
    ids = range(model.get_piece_size())
    tokens = [None if model.is_control(i) or model.is_unknown(i) else model.id_to_piece(i) for i in ids]
    return _spaced_seams(tokens, model.encode)


def _spaced_seams(tokens: Sequence[str | None], encode: Callable[[str], list[int]]) -> Seams | None:
    """`tokens` by id, None for special ones. SEPARATOR must be one token and part of no other."""
    prefix = encode(SEPARATOR)
    if any(token and SEPARATOR in token and token != SEPARATOR for token in tokens) or not _is_known(prefix, tokens):
        return None
    pieces, n_chars = [], []
    for token in tokens:
        byte = BYTE_TOKEN.fullmatch(token or "")
        pieces.append("" if byte or token is None else token.replace(SPACE, " "))
        begins = byte is None or int(byte[1], 16) & 0xC0 != 0x80  # the other bytes of UTF-8 continue a character
        n_chars.append(UNKNOWN_LENGTH if token is None else int(begins) if byte else len(token))
    return Seams(lambda text: encode(SEPARATOR + text)[len(prefix) :], pieces, n_chars, None, None)


def _is_known(ids: Sequence[int], tokens: Sequence[str | None]) -> bool:
    return bool(ids) and all(tokens[i] is not None for i in ids)


def _is_plain_bpe(definition: dict[str, Any]) -> bool:
    """Whether merging goes by rank alone, the property that data.long_text's argument needs."""
    model = definition["model"]
    twists = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return model["type"] == "BPE" and not any(model.get(twist) for twist in twists)


def _is_known_split(step: dict[str, Any]) -> bool:
    pattern = step.get("pattern", {}).get("Regex")
    return (
        step["type"] == "Split" and pattern in WORD_PATTERNS and step["behavior"] == "Isolated" and not step["invert"]
    )


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [inner for part in step["pretokenizers"] for inner in _steps(part)] if step["type"] == "Sequence" else [step]


def _tokens(definition: dict[str, Any]) -> list[str]:
    """Tokens by id; empty where there is none."""
    by_id = {i: token for token, i in definition["model"]["vocab"].items()}
    by_id.update((token["id"], token["content"]) for token in definition["added_tokens"])
    return [by_id.get(i, "") for i in range(max(by_id) + 1)]
