"""Long texts to token ids in pieces, with the ids of the whole text, which takes 50 to 120 bytes of memory per byte.

Two kinds of places where a text may be cut:

- Safe cuts, where every pre-tokenizer known to data.seams begins a new word, whatever stands before and behind.
- Seams between two tokens of a BPE. It merges the best pair (by rank, then from the left) until none is left. Let
  t1 … tn be tokens such that encoding ti + ti+1 alone gives ti, ti+1, for each i; then they are the encoding of the
  whole. For the first merge over a border, say of ti and ti+1, would follow merges inside the tokens only, which go as
  they go in ti + ti+1 alone; so it would happen there too. The tokens of one piece are such a sequence, hence two
  pieces that end and begin at a seam are right together if the two tokens beside it are; that pair is encoded to see.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PIECE_CHARS = 1 << 14  # larger pieces are slower too: their symbols no longer fit the cache
TAIL_CHARS = 1 << 11  # of a piece, searched first for a safe cut
MARGIN_TOKENS = 8  # the last tokens of a piece would often be others had it been longer
SEAM_TRIES = 32  # pieces are encoded again for each
UNKNOWN_LENGTH = -1


@dataclass(frozen=True)
class Seams:
    """What is known of one tokenizer, by token id where it is a list."""

    encode: Callable[[str], list[int]]  # as inside a text: nothing is put before it
    pieces: Sequence[str]  # the text of a token that may stand beside a seam, else empty
    n_chars: Sequence[int]  # characters that begin in a token, or UNKNOWN_LENGTH
    safe_cut: re.Pattern[str] | None  # matches nothing, where a text may be cut
    context: re.Pattern[str] | None  # what must match before a seam


class _Window(NamedTuple):
    start: int
    stop: int
    ids: list[int]


def encode_in_pieces(
    text: str, encode: Callable[[str], list[int]], seams: Seams, piece_chars: int = PIECE_CHARS
) -> Iterator[list[int]]:
    """`encode(text)` in pieces, which begin and end where `seams` permits it; without such places it is one piece."""
    window = _Window(0, stop := _stop(text, 0, piece_chars, seams), encode(text[:stop]))
    while window.stop < len(text):
        joined = _next_window(text, window, seams, piece_chars)
        if joined is None:
            stop = _stop(text, window.start, 2 * (window.stop - window.start), seams)
            encode_start = seams.encode if window.start else encode
            window = _Window(window.start, stop, encode_start(text[window.start : stop]))
            continue
        n_kept, following = joined
        yield window.ids[:n_kept]
        window = following
    yield window.ids


def _stop(text: str, start: int, n_chars: int, seams: Seams) -> int:
    """Where a window of at most `n_chars` characters ends: at its last safe cut, if it has one."""
    stop = start + n_chars
    if stop >= len(text):
        return len(text)
    if seams.safe_cut is not None:
        for begin in (max(start, stop - TAIL_CHARS), start):
            found = seams.safe_cut.finditer(text, begin, stop + 1)  # the pattern looks one character ahead
            cuts = [cut.start() for cut in found if start < cut.start() <= stop]
            if cuts:
                return cuts[-1]
    return stop


def _next_window(text: str, window: _Window, seams: Seams, piece_chars: int) -> tuple[int, _Window] | None:
    """How many tokens of `window` stand before the next one, and that one; None where no place to cut is found."""
    if seams.safe_cut and seams.safe_cut.match(text, window.stop):
        return len(window.ids), _encoded(text, window.stop, seams, piece_chars)
    for n_kept, start in _candidates(text, window, seams):
        following = _encoded(text, start, seams, piece_chars)
        left, right = window.ids[n_kept - 1], following.ids[0]
        if seams.pieces[right] and seams.encode(seams.pieces[left] + seams.pieces[right]) == [left, right]:
            return n_kept, following
    return None


def _encoded(text: str, start: int, seams: Seams, piece_chars: int) -> _Window:
    stop = _stop(text, start, piece_chars, seams)
    return _Window(start, stop, seams.encode(text[start:stop]))


def _candidates(text: str, window: _Window, seams: Seams) -> Iterator[tuple[int, int]]:
    """Borders between two tokens near the end of `window`: tokens before it, characters of `text` before it."""
    start, n_tries = window.stop, 0
    for n_kept in range(len(window.ids) - 1, 0, -1):
        token, before = window.ids[n_kept], window.ids[n_kept - 1]
        if seams.n_chars[token] == UNKNOWN_LENGTH or n_tries == SEAM_TRIES:
            return
        start -= seams.n_chars[token]
        if start == window.start:  # only the space that goes before a whole text is left
            return
        if n_kept > len(window.ids) - MARGIN_TOKENS or not (seams.pieces[token] and seams.pieces[before]):
            continue
        if seams.context is None or seams.context.match(text, start):
            n_tries += 1
            yield n_kept, start
