"""Text as it comes: whole characters, the same text as decoding all at once, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.inference.detokenize import Detokenizer, StopStrings

TEXTS = st.text(alphabet="a e\n'é漢👩\u200d🔬", max_size=30)


@pytest.fixture(scope="module")
def tokenizers(workspace: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """Byte-level, and SentencePiece with bytes for what it does not know."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    lines = (line for line in ["the model learns a bit", "a teacher is sure"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return [load_tokenizer(workspace.teacher), load_tokenizer(Path(folder / "tokenizer.model"))]


@given(prompt=TEXTS, text=TEXTS)
def test_pieces_add_up_to_the_whole_text(tokenizers: list[Tokenizer], prompt: str, text: str) -> None:
    for tokenizer in tokenizers:
        prompt_ids, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + "a" + text)
        if ids[: len(prompt_ids)] != prompt_ids:
            prompt_ids = []
        stream = Detokenizer(tokenizer, prompt_ids)
        pieces = [stream.add(token) for token in ids[len(prompt_ids) :]]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        assert tokenizer.decode(prompt_ids) + "".join(pieces) + stream.rest() == tokenizer.decode(ids)


def test_what_is_no_character_is_shown_in_the_end(tokenizers: list[Tokenizer]) -> None:
    ids = tokenizers[0].encode("a漢")[:-1]
    stream = Detokenizer(tokenizers[0], [])
    assert [stream.add(token) for token in ids] == ["a", "", ""][: len(ids)]
    assert stream.rest() == "\N{REPLACEMENT CHARACTER}"


def cut(text: str, stops: list[str]) -> str:
    """`text` up to the stop string that is complete first; of several at once, the one that begins first."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@given(pieces=st.lists(st.text("ab", max_size=1)), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_the_text_ends_before_the_first_stop_string(pieces: list[str], stops: list[str]) -> None:
    stream, shown, ended = StopStrings(stops), "", False
    for piece in pieces:
        text, ended = stream.add(piece)
        shown += text
        if ended:
            break
    whole = "".join(pieces)
    assert shown + ("" if ended else stream.rest()) == cut(whole, stops)
    assert ended == (cut(whole, stops) != whole or any(whole.endswith(stop) for stop in stops))


def test_no_more_is_held_back_than_may_begin_a_stop_string() -> None:
    stream: Callable[[str], tuple[str, bool]] = StopStrings(["</s>", "ab"]).add
    assert [stream(piece) for piece in ("x<", "/", "y", "a", "<", "/s>z")] == [
        ("x", False),
        ("", False),
        ("</y", False),
        ("", False),
        ("a", False),
        ("", True),
    ]
