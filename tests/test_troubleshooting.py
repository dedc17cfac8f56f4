"""Every message that docs/troubleshooting.md quotes is one that the program prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROOMS = ("fbitrain", "model", "kernels", "data")  # rglob follows no links: fbitrain/model is read as model
HOLE = "…"  # on the page: what differs from case to case


def quoted() -> list[str]:
    """The page's quotations, one line each."""
    blocks = re.findall(r"^> .*(?:\n> .*)*", PAGE, re.MULTILINE)
    return [" ".join(line.removeprefix("> ") for line in block.splitlines()) for block in blocks]


def spoken(tree: ast.AST) -> Iterator[str]:
    """The strings of a module but its docstrings, each value that an f-string fills in shown as a hole."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def all_strings() -> str:
    found = [
        text
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for text in spoken(ast.parse(path.read_text(encoding="utf-8")))
    ]
    shell = (ROOT / "launch" / "setup_env.sh").read_text(encoding="utf-8")
    found += [re.sub(r"\$\([^)]*\)|\$\w+", HOLE, line) for line in shell.splitlines() if "fail " in line]
    return "\n".join(re.sub(f"{HOLE}+", HOLE, text) for text in found)


STRINGS = all_strings()


@pytest.mark.parametrize("message", quoted())
def test_the_message_stands_in_the_source(message: str) -> None:
    assert len(message.replace(HOLE, "").split()) >= 3, "too little to recognize"
    assert message.strip(HOLE + " ") in STRINGS


def test_there_are_twenty_and_no_two_are_one() -> None:
    assert len(quoted()) >= 20
    assert len(set(quoted())) == len(quoted())


def test_docstrings_are_no_messages() -> None:
    module = ast.parse('def f():\n    """Not said."""\n    raise ValueError(f"{x} is said; do {y}")')
    assert next(spoken(module)) == f"{HOLE} is said; do {HOLE}"
    assert "Not said." not in list(spoken(module))
