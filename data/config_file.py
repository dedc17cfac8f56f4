"""The `data:` section of a YAML file, for the data room's own commands; a training configuration is such a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fbitrain.base.errors import UserError
from fbitrain.base.home import with_home
from fbitrain.base.settings import ConfigError, read_values, typed
from fbitrain.data.config import DataConfig, data_problems

OTHER_FIELDS = {"distill": "teacher", "model": "pretrained"}  # each may say where the tokenizer is


@dataclass(frozen=True)
class DataFile:
    """What the data room reads of a configuration."""

    data: DataConfig = field(default_factory=DataConfig)


def read_data_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[DataConfig, str]:
    """The `data:` section of `path` under dotted `overrides`, and where its tokenizer is.

    The tokenizer is data.tokenizer, or where that says "teacher" distill.teacher, or model.pretrained, which is its own
    teacher; "" if the file names neither: not every command needs one. Other sections are not looked at. Raises
    ConfigError for an unreadable file, unknown keys, wrong types, impossible values, and an override of anything else.
    """
    problems = [
        f"override {override!r} must be of the form data.key=value (or distill.teacher=value)"
        for override in overrides
        if not override.startswith(("data.", "distill.teacher=")) or "=" not in override
    ]
    if problems:
        raise ConfigError(str(path), problems)
    values = read_values(path, overrides, problems)
    config, unread = typed(DataFile, {"data": values.get("data", {})}, {}, problems)
    problems += [problem for problem in data_problems(config.data) if not any(name in problem for name in unread)]
    if problems:
        raise ConfigError(str(path), problems)
    data = with_home(config.data)
    if data.tokenizer != "teacher":
        return data, data.tokenizer
    return data, os.path.expanduser(next(filter(None, (_text(values, *item) for item in OTHER_FIELDS.items())), ""))


def require_tokenizer(path: str | Path, overrides: Sequence[str]) -> tuple[DataConfig, str]:
    """`read_data_config` for a command that needs the tokenizer; UserError if the file names none."""
    data, tokenizer_path = read_data_config(path, overrides)
    if not tokenizer_path:
        raise UserError(f"{path} names no tokenizer; set data.tokenizer, or distill.teacher")
    return data, tokenizer_path


def _text(values: Any, section: str, key: str) -> str:
    found = values.get(section)
    return str(found.get(key) or "") if isinstance(found, dict) else ""
