"""No file asks which method it deals with by its name: the table of methods answers, and a method's own layer."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fbitrain.model.method_table import METHODS

ROOT = Path(__file__).parents[1]
# The table, and the files of the layers that it names.
OWN_FILES = {"model/method_table.py"} | {f"model/{method.layer.partition('.')[0]}.py" for method in METHODS.values()}
ROOMS = ("model", "fbitrain", "launch")
FILES = {  # each once, not again through the package's links to the other rooms
    name: path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))
    if (name := str(path.resolve().relative_to(ROOT))).startswith(ROOMS) and name not in OWN_FILES
}
# Words that are a method's name too. Five kinds of packed layers serve all methods; a release's config.json has one in
# `layer`. The others are a phase of a run, the setting's default, and a word of the model card.
KINDS = {"binary", "ternary", "partial", "onebit"}
ALLOWED_NAMES = {
    "packing.py": {"binary"},
    "packed_layers.py": KINDS,
    "remote_code.py": KINDS,
    "compiled.py": {"binary"},
    "decoding.py": {"binary"},
    "latent.py": {"binary"},
    "config.py": {"binary"},
    "model_card.py": {"ternary"},
}
# The one place that looks a method up.
ALLOWED_READS = {"config.py": {"METHODS.get(self.method, UNKNOWN)"}}


def offences(source: str, names: set[str], reads: set[str]) -> Iterator[str]:
    """Each use of a method's name, and each read of `.method` that is more than showing or storing the name."""
    tree = ast.parse(source)
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in METHODS.keys() - names:
            yield f"line {node.lineno}: the name {node.value!r}"
        elif isinstance(node, ast.Attribute) and node.attr == "method":
            parent = parents[node]
            stored = isinstance(parent, ast.Dict) and node in parent.values
            if not (stored or isinstance(parent, ast.FormattedValue) or ast.unparse(parent) in reads):
                yield f"line {node.lineno}: {ast.unparse(parent)}"


@pytest.mark.parametrize("name", FILES)
def test_no_other_file_asks_for_a_methods_name(name: str) -> None:
    path = FILES[name]
    allowed = ALLOWED_NAMES.get(path.name, set()), ALLOWED_READS.get(path.name, set())
    found = list(offences(path.read_text(encoding="utf-8"), *allowed))
    assert not found, f"{name} asks for the name of a method; let model/method_table.py answer: {'; '.join(found)}"


def test_every_exception_is_used() -> None:
    for name, allowed in (*ALLOWED_NAMES.items(), *ALLOWED_READS.items()):
        source = "".join(path.read_text(encoding="utf-8") for path in FILES.values() if path.name == name)
        for text in allowed:
            assert (f'"{text}"' if text in METHODS else text) in source, f"{name} needs no exception for {text}"


@pytest.mark.parametrize(
    "source",
    [
        "b.method == 'other'",
        "kind == 'onebit'",
        "b.method in SALIENT",
        "method = b.method",
        "WORDS[b.method]",
        "WORDS.get(b.method)",
        "{'recu': 1}",
        "match b.method:\n    case x: pass",
        "match x:\n    case 'bnn': pass",
        "{b.method: 1}",
    ],
)
def test_a_comparison_is_found(source: str) -> None:
    assert list(offences(source, set(), set()))


def test_showing_and_storing_a_name_are_no_comparisons() -> None:
    assert not list(offences("f'binarize.method={b.method}', {'method': b.method}, b.traits.salient", set(), set()))
