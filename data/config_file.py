"""The `data:` section of a YAML file, for the data room's own commands; a training configuration is such a file."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fbitrain.data.config import DataConfig, PhaseConfig, SourceConfig, data_problems
from fbitrain.data.errors import DataError


def read_data_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[DataConfig, str]:
    """The `data:` section of `path` under dotted `overrides`, and where its tokenizer is.

    The tokenizer is data.tokenizer, or where that says "teacher" distill.teacher, or model.pretrained, which is its own
    teacher; "" if the file names neither: not every command needs one. Other sections are not looked at. Raises
    DataError for an unreadable file, an unknown key, a wrong type, an impossible value, and an override of anything
    else.
    """
    tree = _read_yaml(path)
    for override in overrides:
        _apply(tree, override)
    try:
        section = tree.get("data", {})
        section = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
        teacher = OmegaConf.select(tree, "distill.teacher") or OmegaConf.select(tree, "model.pretrained")
    except OmegaConfBaseException as error:
        raise DataError(f"{path}: an interpolation cannot be resolved ({_first_line(error)}); correct it") from None
    data = _typed(path, section)
    problems = list(data_problems(data))
    if problems:
        raise DataError("\n".join(f"{path}: {problem}" for problem in problems))
    return data, data.tokenizer if data.tokenizer != "teacher" else str(teacher or "")


def _read_yaml(path: str | Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give a training configuration, as in launch/configs") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise DataError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); correct it") from None
    if not isinstance(tree, DictConfig):
        raise DataError(f"{path} must hold sections such as data:, not a list or a single value")
    return tree


def _apply(tree: DictConfig, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not (key.startswith("data.") or key == "distill.teacher"):
        raise DataError(f"override {override!r} must be of the form data.key=value (or distill.teacher=value)")
    try:
        # OmegaConf's own YAML dialect, in which 1e-3 is a number.
        parsed = OmegaConf.create(f"value: {value}" if value else "value: ''")
        OmegaConf.update(tree, key, OmegaConf.select(parsed, "value"))
    except (OmegaConfBaseException, yaml.YAMLError, AssertionError, ValueError, IndexError, TypeError) as error:
        raise DataError(f"override {override!r} cannot be applied ({_first_line(error)}); correct it") from None


def _typed(path: str | Path, section: Any) -> DataConfig:
    if not isinstance(section, dict):
        raise DataError(f"{path}: data is a section, but it is given as {section!r}; list its fields below it")
    try:
        return cast(DataConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(DataConfig), section)))
    except OmegaConfBaseException as error:
        raise DataError(f"{path}: {_misfit(error)}") from None


def _misfit(error: OmegaConfBaseException) -> str:
    """Which field of which section OmegaConf refused. It does not say in which item of a list."""
    sections = {cls.__name__: cls for cls in (DataConfig, SourceConfig, PhaseConfig)}
    name = getattr(error.object_type, "__name__", "")
    if name not in sections:
        return f"data.{error.full_key} does not fit ({_first_line(error)}); correct it"
    types = {field.name: field.type for field in fields(sections[name])}
    key = str(error.key)
    if key in types:
        return f"data: field {key} of {name} must be of type {types[key]} ({_first_line(error)})"
    near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"its fields are {', '.join(sorted(types))}"
    return f"data: {key} is not a field of {name}; {hint}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
