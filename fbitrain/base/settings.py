"""From a YAML file and dotted overrides to a tree of dataclasses, whatever tree it is; every problem is collected."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fbitrain.base.errors import UserError

T = TypeVar("T")
INTEGER_BITS = 64
EXTENDS = "extends"
SHIPPED = Path(__file__).parents[1] / "launch" / "configs"


class ConfigError(UserError):
    """One or more problems in a configuration; the message lists them all, one per line."""

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        if len(self.problems) == 1:
            super().__init__(f"config error in {where}: {self.problems[0]}")
        else:
            super().__init__(
                f"{len(self.problems)} config errors in {where}:\n" + "\n".join(f"  {p}" for p in self.problems)
            )


def shipped_configs() -> list[Path]:
    """The configurations that come with fbitrain."""
    return sorted(SHIPPED.glob("*.yaml"))


def read_values(name: str | Path, overrides: Sequence[str], problems: list[str]) -> Any:
    """The plain values of the file `name`, or of the shipped one that is called so, such as quickstart.

    A file with `extends: NAME` has the settings of that file, named alike or seen from its own folder, where it says
    nothing else. `overrides` such as `optim.lr=1e-3` are applied; what is wrong with those is added to `problems`.
    Raises ConfigError for a file that cannot be read.
    """
    path = Path(name)
    raw = _read_extended(_located(path))
    for override in overrides:
        _apply_override(raw, override, problems)
    try:
        values = OmegaConf.to_container(raw, resolve=True)
        _require_small_integers(values)
    except OmegaConfBaseException as error:
        raise ConfigError(str(path), [f"an interpolation cannot be resolved: {_first_line(error)}"]) from None
    except (RecursionError, OverflowError) as error:
        raise ConfigError(str(path), [_excess(error)]) from None
    return values


def typed(root: type[T], values: Any, defaults: Mapping[str, Any], problems: list[str]) -> tuple[T, list[str]]:
    """`values` over `defaults` (dotted keys) over the defaults of `root`, and the names of the fields whose value has
    the wrong type. Reasons for whatever does not fit go to `problems`.
    """
    tree = OmegaConf.structured(root)
    _unlock(tree)
    for key, value in defaults.items():
        OmegaConf.update(tree, key, value)
    merger = _Merger(root, problems)
    merger.merge(tree, root, values, "")
    return cast(T, OmegaConf.to_object(tree)), merger.unread


class _Merger:
    """Puts values into a tree of `root`; collects what does not fit, and the names of fields that could not be read."""

    def __init__(self, root: type, problems: list[str]) -> None:
        self.root = root
        self.problems = problems
        self.unread: list[str] = []

    def merge(self, tree: DictConfig, cls: type, values: Mapping[str, Any], prefix: str) -> None:
        """`values` of the section `cls`, whose fields are called `prefix` and their name."""
        hints = get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        for key, value in values.items():
            name = f"{prefix}{key}"
            if key not in known:
                self.problems.append(f"{name} is not a field of {cls.__name__}{self._hint(str(key), known, prefix)}")
            elif is_dataclass(hints[key]):
                if isinstance(value, Mapping):
                    self.merge(tree, cast(type, hints[key]), value, f"{name}.")
                else:
                    self.unread.append(f"{name}.")
                    self.problems.append(f"{name} is a section, but it is given as {value!r}")
            elif (args := get_args(hints[key])) and is_dataclass(args[0]):
                self._merge_list(tree, cast(type, args[0]), value, name)
            elif not self._set(tree, name, value, hints[key]):
                self.unread.append(name)

    def _merge_list(self, tree: DictConfig, cls: type, value: Any, name: str) -> None:
        """A list of sections such as data.sources: each item is checked as a section of its own."""
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            self.unread.append(name)
            known = ", ".join(f.name for f in fields(cls))
            self.problems.append(f"{name} must be a list of sections, each with the fields {known}")
            return
        items = []
        for i, item in enumerate(value):
            node = OmegaConf.structured(cls)
            _unlock(node)
            n_problems, n_unread = len(self.problems), len(self.unread)
            self.merge(node, cls, item, "")
            for found, count in ((self.problems, n_problems), (self.unread, n_unread)):
                found[count:] = [f"{name}[{i}].{text}" for text in found[count:]]
            items.append(node)
        OmegaConf.update(tree, name, items, merge=False)

    def _set(self, tree: DictConfig, name: str, value: Any, hint: Any) -> bool:
        """Whether `value` fits the field `name`; a float must be a number that can be computed with."""
        try:
            OmegaConf.update(tree, name, value, merge=False)
        except OmegaConfBaseException:
            wanted = getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint)
            self.problems.append(f"{name}={value!r} is not of type {wanted}")
            return False
        stored = OmegaConf.select(tree, name)
        numbers = list(stored) if isinstance(stored, ListConfig) else [stored]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            self.problems.append(
                f"{name}={numbers if isinstance(stored, ListConfig) else stored} is not a finite number"
            )
            return False
        return True

    def _hint(self, key: str, known: set[str], prefix: str) -> str:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        if near:
            return f"; did you mean {prefix}{near[0]}?"
        for name, section in get_type_hints(self.root).items():  # a right key in the wrong section
            if is_dataclass(section) and key in {f.name for f in fields(section)}:
                return f"; did you mean {name}.{key}?"
        return f"; its fields are {', '.join(sorted(known))}"


def _located(path: Path) -> Path:
    """`path`, or where there is no such file the shipped one of that name, if there is one."""
    shipped = SHIPPED / f"{path.name}.yaml"
    return shipped if not path.exists() and shipped in shipped_configs() else path


def _read_extended(path: Path, extending: tuple[Path, ...] = ()) -> DictConfig:
    """The settings of `path` over those of the file that it extends; `extending` are the files that extend it."""
    raw = _read_yaml(path)
    base = raw.pop(EXTENDS, None)
    if base is None:
        return raw
    if path in extending:
        raise ConfigError(str(path), [f"it extends {base}, which extends it"])
    try:
        extended = OmegaConf.merge(_read_extended(_located(path.parent / str(base)), (*extending, path)), raw)
    except OmegaConfBaseException as error:
        raise ConfigError(str(path), [f"it does not fit {base}, which it extends: {_first_line(error)}"]) from None
    return cast(DictConfig, extended)


def _read_yaml(path: Path) -> DictConfig:
    try:
        raw = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(str(path), ["there is no such file; `fbitrain config list` names the shipped ones"]) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(str(path), [f"it cannot be read as YAML: {_excess(error)}"]) from None
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(str(path), [f"it cannot be read as YAML: {' '.join(str(error).split())}"]) from None
    if not isinstance(raw, DictConfig):
        raise ConfigError(str(path), ["it must hold sections such as model: and train:, not a list or a single value"])
    return raw


def _apply_override(raw: DictConfig, override: str, problems: list[str]) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        problems.append(f"override {override!r} is not of the form section.key=value")
        return
    try:
        # OmegaConf's own YAML dialect, in which 1e-3 is a number.
        parsed = OmegaConf.create(f"value: {value}" if value else "value: ''")
        OmegaConf.update(raw, key, OmegaConf.select(parsed, "value"))
    except RecursionError as error:
        problems.append(f"override {override[:80]!r} cannot be applied: {_excess(error)}")
    except (OmegaConfBaseException, yaml.YAMLError, AssertionError, ValueError, IndexError, TypeError) as error:
        problems.append(f"override {override[:80]!r} cannot be applied: {_first_line(error)}")


def _excess(error: Exception) -> str:
    """What Python could not read, in the user's words."""
    return "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())


def _require_small_integers(values: Any) -> None:
    """Raises OverflowError for an integer that no field has room for: Python cannot even print the largest ones."""
    if isinstance(values, int) and values.bit_length() > INTEGER_BITS:
        raise OverflowError(f"it holds an integer of {values.bit_length():,} bits; {INTEGER_BITS} are the most")
    if isinstance(values, Mapping | list):
        for item in values.values() if isinstance(values, Mapping) else values:
            _require_small_integers(item)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _unlock(node: DictConfig) -> None:
    """Frozen dataclasses become read-only nodes; we fill them before anyone sees them."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _unlock(child)
