"""Conversations as token ids, by the chat template that comes with a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers.utils.chat_template_utils import render_jinja_template

from fbitrain.base.errors import UserError
from fbitrain.data.tokenizer import HFTokenizer, Tokenizer
from fbitrain.data.tokenizing.gguf_tokenizer import read_metadata
from fbitrain.loading.language_model import first_line
from fbitrain.loading.tokenizer_folder import CHAT_TEMPLATE, read_settings

GGUF_TEMPLATE = "tokenizer.chat_template"
SPARE = range(0xF0000, 0xFFFFE)  # characters that Unicode leaves to private use
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


class ChatTemplate:
    """`source`: the template in Jinja. `names`: what it calls some tokens, such as bos_token."""

    def __init__(self, source: str, tokenizer: HFTokenizer, names: Mapping[str, str]) -> None:
        self._source, self._tokenizer, self._names = source, tokenizer, names
        specials = sorted(tokenizer.special_names, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of `messages` ("role" and "content" of each) and of the beginning of the answer.

        The name of a special token in a content stays text, so that no one writes the end of a message into a message.
        Raises UserError where the template refuses the conversation.
        """
        # The template sees a character of its own for each such name.
        spare = (chr(code) for code in SPARE if not any(chr(code) in message["content"] for message in messages))
        marks: dict[str, str] = {}

        def mark(found: re.Match[str]) -> str:
            if found[0] not in marks:
                marks[found[0]] = next(spare)
            return marks[found[0]]

        hidden = [{**message, "content": self._special.sub(mark, message["content"])} for message in messages]
        text = self._render(hidden)
        names = {character: name for name, character in marks.items()}
        ids: list[int] = []
        for part in re.split(f"([{''.join(names)}])", text) if names else [text]:
            ids += self._tokenizer.encode(names[part]) if part in names else self._tokenizer.encode_markup(part)
        return ids

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            (text,), _ = render_jinja_template(
                [messages], chat_template=self._source, add_generation_prompt=True, **self._names
            )
        except TEMPLATE_ERRORS as error:
            raise UserError(f"the model's chat template refuses the conversation: {first_line(error)}") from error
        return str(text)


def load_chat_template(tokenizer: Tokenizer, folder: Path) -> ChatTemplate:
    """The chat template of the model in `folder`. Raises UserError where there is none, or none that can be used."""
    source, where = _source(tokenizer, folder)
    if not source:
        raise UserError(f"the tokenizer of {where} has no chat template; give text to continue instead")
    if not isinstance(tokenizer, HFTokenizer):
        raise UserError(f"{where} has a chat template but no tokenizer.json, which chat needs; release the model anew")
    names = {name: _content(value) for name, value in read_settings(folder).items() if name.endswith("_token")}
    template = ChatTemplate(source, tokenizer, {name: text for name, text in names.items() if text})
    try:
        template.encode([{"role": "user", "content": "a"}])
    except UserError as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            raise UserError(
                f"the chat template of {where} is damaged: {first_line(error.__cause__)}; get it anew"
            ) from error
    return template


def _source(tokenizer: Tokenizer, folder: Path) -> tuple[str, Path]:
    """The template's text, "" if there is none, and where the tokenizer is."""
    path = Path(tokenizer.path)
    if path.suffix == ".gguf":
        return str(read_metadata(str(path), GGUF_TEMPLATE).get(GGUF_TEMPLATE, "")), path
    if (folder / CHAT_TEMPLATE).is_file():
        try:
            return (folder / CHAT_TEMPLATE).read_text(encoding="utf-8"), folder
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{folder / CHAT_TEMPLATE} cannot be read ({error}); get it anew") from None
    found = read_settings(folder).get("chat_template")
    if isinstance(found, list):  # several by name
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else "", folder


def _content(value: Any) -> str:
    """The name of a token, as a tokenizer_config.json has it: a string, or an object with its content."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""
