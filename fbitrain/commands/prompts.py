"""The prompts that `fbitrain generate` is given: on its command line, in files, and on stdin; each read when its turn
has come."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

from fbitrain.base.errors import UserError

STDIN = Path("-")


class Prompt(NamedTuple):
    text: str
    where: str  # as messages name it, such as "prompts.txt, line 3"


def read_prompts(texts: Sequence[str], files: Sequence[Path]) -> Iterator[Prompt]:
    """`texts`, then the prompts in `files`: one a line, and in a .jsonl file a JSON string or an object's "prompt".

    Lines without a letter are left out. Raises UserError for a file that cannot be read, and for a line that is no
    prompt.
    """
    for number, text in enumerate(texts, 1):
        yield Prompt(text, "the prompt" if len(texts) == 1 else f"prompt {number}")
    for file in files:
        name = "stdin" if file == STDIN else str(file)
        try:
            with nullcontext(sys.stdin.buffer) if file == STDIN else file.open("rb") as lines:
                yield from _prompts_of_lines(lines, name, as_json=file.suffix == ".jsonl")
        except OSError as error:
            raise UserError(f"{name} cannot be read: {error.strerror or error}") from error


def _prompts_of_lines(lines: IO[bytes] | Iterable[bytes], name: str, *, as_json: bool) -> Iterator[Prompt]:
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 ({error.reason}); give prompts as UTF-8 text") from None
        if text.strip():
            yield Prompt(_prompt_of_json(text, where) if as_json else text, where)


def _prompt_of_json(line: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError(f'{where} holds no prompt; give a JSON string, or an object such as {{"prompt": "Once"}}')
    return prompt
