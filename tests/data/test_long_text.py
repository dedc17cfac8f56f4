"""Long texts in pieces: the ids of the whole, for every kind of tokenizer and every kind of text; little memory."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from fbitrain.data.tokenizer import LONG_CHARS, HFTokenizer, SentencePieceTokenizer, Tokenizer
from fbitrain.data.tokenizing import seams
from fbitrain.data.tokenizing.long_text import encode_in_pieces

Kinds = dict[str, Tokenizer]
ATOMS = [
    *(
        "a",
        "b",
        "the",
        "ing",
        "tion",
        "ll",
        "'ll",
        "'S",
        "X",
        " ",
        "  ",
        " the",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "/",
        "!",
        "é",
    ),
    *(
        "1",
        "23",
        "漢字",
        "и",
        "ع",
        "👩‍🔬",
        "\u0301",
        "\u200b",
        "\ufeff",
        "\0",
        "\ue000",
        "▁",
        "<0x0A>",
        "<s>",
        "\x85",
        "\x1c",
    ),
]
REDPAJAMA = Path(__file__).parents[2].parent / "shared" / "data" / "redpajama"
LLAMA = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizer" / "llama.model"
CORPUS = [Path(__file__).read_text(), Path(seams.__file__).read_text()]


def byte_level_bpe(*words: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(words))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def train_sentencepiece(folder: Path, **changed: Any) -> sentencepiece.SentencePieceProcessor:
    """With LLaMA-2's settings, as its tokenizer.model states them."""
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    options = {
        "model_type": "bpe", "vocab_size": 800, "byte_fallback": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "split_digits": True, "allow_whitespace_only_pieces": True,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "m"), minloglevel=2, **{**options, **changed}
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


def metaspace_bpe(model: sentencepiece.SentencePieceProcessor, old: bool) -> tokenizers.Tokenizer:
    """The tokenizer.json of a SentencePiece BPE: of every piece all pairs that make it up, the best piece first."""
    vocabulary = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    best = sorted(
        (piece for piece in vocabulary if len(piece) > 1), key=lambda piece: -model.get_score(vocabulary[piece])
    )
    cuts = [(piece[:i], piece[i:]) for piece in best for i in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in vocabulary and right in vocabulary]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if old:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def hf(backend: tokenizers.Tokenizer) -> HFTokenizer:
    return HFTokenizer("in memory", backend, None, None)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    whole, split = pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Digits(individual_digits=True)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found: Kinds = {
        f"pattern {i}": hf(byte_level_bpe(pre_tokenizers.Split(Regex(pattern), "isolated"), bare))
        for i, pattern in enumerate(sorted(seams.WORD_PATTERNS))
    }
    found["GPT-2"], found["SmolLM2"] = hf(byte_level_bpe(whole)), hf(byte_level_bpe(split, whole))
    composed = byte_level_bpe(whole)
    composed.normalizer = normalizers.NFC()
    found["NFC"] = hf(composed)
    folder = tmp_path_factory.mktemp("sentencepiece")
    model = train_sentencepiece(folder)
    found["SentencePiece"] = SentencePieceTokenizer("in memory", str(folder / "m.model"))
    found["LLaMA, old"], found["LLaMA, new"] = (hf(metaspace_bpe(model, old)) for old in (True, False))
    if LLAMA.is_file():
        found["LLaMA's own"] = SentencePieceTokenizer(str(LLAMA), str(LLAMA))
    return found


def pieces(tokenizer: Tokenizer, text: str, piece_chars: int) -> list[list[int]]:
    assert tokenizer._seams is not None
    return list(encode_in_pieces(text, tokenizer._encode_whole, tokenizer._seams, piece_chars))


def joined(parts: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(parts))


def test_every_one_of_these_kinds_may_be_cut(kinds: Kinds) -> None:
    assert [name for name, tokenizer in kinds.items() if tokenizer._seams is None] == []


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(ATOMS), min_size=1, max_size=300).map("".join), st.integers(40, 200))
def test_pieces_are_the_whole(kinds: Kinds, text: str, piece_chars: int) -> None:
    for name, tokenizer in kinds.items():
        assert joined(pieces(tokenizer, text, piece_chars)) == tokenizer._encode_whole(text), name


@pytest.mark.parametrize("atoms", [["a"], ["ab", "a"], list("etaoinshr"), ["word", ". "], ["я", " ", "я"]])
def test_runs_without_end_are_cut_too(kinds: Kinds, atoms: list[str]) -> None:
    text = "".join(random.Random(0).choices(atoms, k=8000))
    for name, tokenizer in kinds.items():
        parts = pieces(tokenizer, text, 200)
        assert joined(parts) == tokenizer._encode_whole(text), name
        assert max(map(len, parts)) <= 800, name


@pytest.mark.parametrize("atoms", ["e\u0301", " ", "\n", "7", "漢", "👍🏽", "я", "'ll"])
def test_runs_that_may_not_be_cut_come_out_all_the_same(kinds: Kinds, atoms: str) -> None:
    for text in (atoms * 700, f"some words {atoms * 700} and more words"):
        for name, tokenizer in kinds.items():
            assert joined(pieces(tokenizer, text, 100)) == tokenizer._encode_whole(text), name


def test_real_text(kinds: Kinds) -> None:
    if not REDPAJAMA.is_dir():
        pytest.skip(f"{REDPAJAMA} is absent: genuine RedPajama documents are not encoded in pieces")
    for path in sorted(REDPAJAMA.glob("*/*.jsonl")):
        with path.open() as file:
            text = json.loads(next(file))["text"][:60_000]
        for name, tokenizer in kinds.items():
            parts = pieces(tokenizer, text, 500)
            assert joined(parts) == tokenizer._encode_whole(text), (path, name)
            assert max(map(len, parts)) < 4000, (path, name)


def test_long_texts_go_that_way_and_short_ones_do_not(kinds: Kinds) -> None:
    calls: list[int] = []
    for name in ("SmolLM2", "SentencePiece"):
        tokenizer = kinds[name]
        text = "some words and more " * (LONG_CHARS // 10)
        expected = tokenizer._encode_whole(text)
        calls.clear()
        patched = pytest.MonkeyPatch()
        patched.setattr(tokenizer, "_encode_whole", counted(tokenizer._encode_whole, calls))
        assert tokenizer.encode(text) == expected
        found = tokenizer.encode_array(text)
        assert tokenizer.encode("short") == tokenizer.encode_array("short").tolist()
        patched.undo()
        assert found.dtype == np.uint32
        assert found.tolist() == expected
        assert max(calls) < LONG_CHARS


def counted(encode: Callable[[str], list[int]], calls: list[int]) -> Callable[[str], list[int]]:
    def counting(text: str) -> list[int]:
        calls.append(len(text))
        return encode(text)

    return counting


def test_unknown_kinds_are_never_cut(tmp_path: Path) -> None:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    strange = [
        byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        byte_level_bpe(pre_tokenizers.Whitespace()),
    ]
    strange.append(byte_level_bpe(pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated"), whole))
    strange.append(byte_level_bpe(whole))
    strange[-1].normalizer = normalizers.Strip()
    strange.append(byte_level_bpe(whole))
    strange[-1].model.dropout = 0.1
    strange.append(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    for backend in strange:
        definition = json.loads(backend.to_str())
        assert seams.byte_level_seams(definition, lambda text: []) is None
        assert seams.metaspace_seams(definition, lambda text: []) is None
    for changed in (
        {"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True},
        {"byte_fallback": False, "character_coverage": 1.0}, {"user_defined_symbols": ["a b"]},
    ):  # fmt: skip
        assert seams.sentencepiece_seams(train_sentencepiece(tmp_path, **changed)) is None, changed


def test_a_text_that_holds_an_added_token_is_not_cut() -> None:
    backend = byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_tokens([AddedToken("words and", normalized=False)])
    tokenizer = hf(backend)
    with_it, without = "some words and more " * LONG_CHARS, "some words or more " * LONG_CHARS
    assert not tokenizer._may_be_cut(with_it)
    assert tokenizer._may_be_cut(without)
