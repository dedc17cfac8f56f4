"""`~` in settings that name a file or a folder: it stands for the user's home, as in a shell."""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

# Metadata of a dataclass field, a string or a list of strings, that holds paths. Patterns (data.sources, data.heldout,
# calibration.path) are no such fields: a home folder with glob characters in its name must be escaped in them.
PATH = {"path": True}

T = TypeVar("T")


def with_home(settings: T) -> T:
    """`settings`, a tree of dataclasses, with `~` and `~user` expanded in each field marked with PATH."""
    tree: Any = settings
    values = {field.name: _expanded(getattr(tree, field.name), "path" in field.metadata) for field in fields(tree)}
    expanded: T = replace(tree, **values)
    return expanded


def _expanded(value: Any, is_path: bool) -> Any:
    if is_dataclass(value):
        return with_home(value)
    if isinstance(value, list):
        return [_expanded(item, is_path) for item in value]
    return os.path.expanduser(value) if is_path else value
