"""Text shortened to one line of a terminal, with control characters and line ends shown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from fbitrain.data.tokenizer import Tokenizer

HEAD_CHARS, TAIL_CHARS = 160, 60
FIRST_CONTROL_PICTURE = 0x2400  # Unicode's pictures of the control characters 0x00 to 0x1f


def excerpt(text: str, head: int = HEAD_CHARS, tail: int = TAIL_CHARS) -> str:
    """`text` as one line, control and invisible characters escaped; the middle of a long one left out.

    `head` and `tail` are the characters that stay at either end.
    """
    if len(text) <= head + tail:
        return visible(text)
    n_left_out = len(text) - head - tail
    return f"{visible(text[:head])} [... {n_left_out:,} characters ...] {visible(text[len(text) - tail :])}"


def decoded(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """The text of `ids`, those beyond the vocabulary, which ready-made ones may be, as <id N>."""
    runs = itertools.groupby(ids, lambda token_id: token_id < tokenizer.vocab_size)
    return "".join(
        tokenizer.decode(list(run)) if known else "".join(f"<id {token_id}>" for token_id in run) for known, run in runs
    )


def visible(text: str) -> str:
    """Every character as one that can be seen: a newline as ␊, a zero-width space as <U+200B>."""
    return "".join(char if char.isprintable() else _name(ord(char)) for char in text)


def _name(code: int) -> str:
    # Not as escapes: LaTeX and program code are full of backslashes of their own.
    if code < 0x20:
        return chr(FIRST_CONTROL_PICTURE + code)
    return f"<U+{code:04X}>"
