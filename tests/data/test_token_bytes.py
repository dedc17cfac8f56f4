"""Bytes of each token: exact where the vocabulary tells them, and always those of the text in all."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.data.tokenizing.token_bytes import bytes_of_tokens

TEXT = "two  spaces, 漢字 and 👩‍🔬 é\n\n\tin x1 = 12 " * 3
CORPUS = [line for line in Path(__file__).read_text().splitlines() if line]


def byte_level(folder: Path) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens(["漢字"])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def sentencepiece_bpe(folder: Path) -> Tokenizer:
    written = io.BytesIO()
    kind = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        vocab_size=400,
        remove_extra_whitespaces=False,
        minloglevel=2,
        **kind,
    )
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return load_tokenizer(folder)


def metaspace(folder: Path) -> Tokenizer:
    """What sentencepiece_bpe is in a tokenizer.json."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = ["▁", "a", "n", "d", "▁a", "an", "▁an", "▁and"]
    merges = [("▁", "a"), ("a", "n"), ("▁a", "n"), ("▁an", "d")]
    vocab = {token: i for i, token in enumerate(["<unk>", *byte_tokens, *letters])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    shown = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(shown)
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize("make", [byte_level, sentencepiece_bpe, metaspace])
@pytest.mark.parametrize("text", [TEXT, f" {TEXT}", "and", " ", "漢"])
def test_every_token_has_its_own_bytes(make: Callable[[Path], Tokenizer], text: str, tmp_path: Path) -> None:
    tokenizer = make(tmp_path)
    ids = tokenizer.encode(text)
    data = text.encode()
    found = bytes_of_tokens(ids, len(data), tokenizer)
    assert (len(found), found.sum()) == (len(ids), len(data))
    ends = np.cumsum(found)
    for n, end in enumerate(ends, 1):
        shown = tokenizer.decode(ids[:n])
        if "\ufffd" not in shown:  # which stands for a character that is not yet complete
            assert data[:end].decode().lstrip() == shown.lstrip()  # decoders leave out a first space
    begun = [n for n in range(len(ids)) if found[n] == 0]
    assert begun in ([], [0])  # SentencePiece's first space is no byte of the text


def test_parts_of_a_character_count_one_byte_each(byte_tokenizer: str) -> None:
    tokenizer = load_tokenizer(byte_tokenizer)
    assert bytes_of_tokens(tokenizer.encode("a漢"), 4, tokenizer).tolist() == [1, 1, 1, 1]


def test_a_normalized_text_counts_as_it_was_written(tmp_path: Path) -> None:
    """WordPiece drops spaces and marks, and knows few words; NFKC makes 2 letters of the one character ﬁ."""
    vocab = {"[UNK]": 0, "the": 1, "mod": 2, "##el": 3, "fi": 4}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("The  MODEL ﬁ strange   words", "ﬁ", "the " * 1000, " the"):
        found = bytes_of_tokens(tokenizer.encode(text), len(text.encode()), tokenizer)
        assert found.sum() == len(text.encode())
        assert (found >= 0).all()
    assert bytes_of_tokens([], 3, tokenizer).tolist() == []
