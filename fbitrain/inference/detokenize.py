"""Tokens to text as they come: whole characters, and an end where a stop string stands."""

from __future__ import annotations

from collections.abc import Sequence

from fbitrain.data.reading.records import REPLACEMENT
from fbitrain.data.tokenizer import Tokenizer


class Detokenizer:
    """The text that tokens add to a prompt. What a piece says is never taken back.

    A character or a leading space may need its neighbours, so a token is decoded together with those of the piece
    before it. A text that ends in U+FFFD is held back, for the next token may complete the character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> None:
        self._decode = tokenizer.decode
        self._ids = list(prompt_ids)  # those of the last piece, and of the next
        self._n_new = 0  # of them of the next
        self._n_shown = len(self._decode(self._ids))  # characters of the last piece

    def add(self, token: int) -> str:
        """What `token` adds, "" while a character's bytes are still coming."""
        self._ids.append(token)
        self._n_new += 1
        text = self._decode(self._ids)
        piece = "" if text.endswith(REPLACEMENT) else text[self._n_shown :]
        if piece:
            self._ids = self._ids[-self._n_new :]
            self._n_new, self._n_shown = 0, len(self._decode(self._ids))
        return piece

    def rest(self) -> str:
        """What is held back, with U+FFFD for what is no character; nothing may be added after it."""
        return self._decode(self._ids)[self._n_shown :]


class StopStrings:
    """Passes text on until one of `stops` stands in it. What may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """What can be shown, and whether it ends here, before a stop string."""
        text = self._held + piece
        found = [at for at in map(text.find, self._stops) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        n_held = max((self._begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False

    def rest(self) -> str:
        """What is held back, where the text ends without a stop string."""
        return self._held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many characters at the end of `text` are the beginning of `stop`."""
        longest = min(len(stop) - 1, len(text))
        return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
