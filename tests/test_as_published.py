"""The table of docs/finetuning.md that lays every method beside its authors' code: no method is missing, and every test
that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fbitrain.model.method_table import METHODS

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8").partition("\n## As published")[2]
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in SECTION.partition("\n## ")[0].splitlines()
    if line.startswith("| ")
][1:]


def test_every_method_has_a_row() -> None:
    named = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in ROWS)))
    assert named == set(METHODS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}: {row[1]}".replace("`", ""))
def test_the_named_test_exists(row: list[str]) -> None:
    _, what, published, test = row
    assert what
    assert published
    found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
    assert found, f"{test!r} is no test"
    tree = ast.parse((ROOT / found[1]).read_text(encoding="utf-8"))
    assert found[2] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
