"""Held-out text: joined, tokenized once, never silently empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.reading.heldout_text import load_heldout
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: str) -> Tokenizer:
    return load_tokenizer(byte_tokenizer)


def test_heldout_is_the_joined_text_tokenized_once(
    tmp_path: Path, tokenizer: Tokenizer, write_shard: Any, caplog: Any
) -> None:
    (tmp_path / "c.raw").write_bytes("\ufeff = WikiText =\r\n\n é\n".encode("utf-8"))
    (tmp_path / "b.txt").write_text("plain\n")
    write_shard(tmp_path / "a.jsonl.zst", ["one\n", "漢"])
    with open(tmp_path / "d.jsonl", "w") as file:
        file.write('{"text": "last"}\nbad\n')
    heldout = load_heldout([str(tmp_path)], tokenizer)
    joined = "one\n\n\n漢\n\nplain\n\n\n = WikiText =\r\n\n é\n\n\nlast"
    assert tokenizer.decode(heldout.token_ids.tolist()) == joined
    assert heldout.token_ids.tolist() == tokenizer.encode(joined)
    assert (heldout.token_bytes.sum(), heldout.n_documents) == (len(joined.encode()), 5)
    assert "line 2: not JSON" in caplog.text


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"bad\n"), ("a.txt", b""), ("a.txt", b"\xff")])
def test_heldout_without_text(tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name if content == b"\xff" else "data.heldout: .* holds no text"):
        load_heldout([str(tmp_path)], tokenizer)
