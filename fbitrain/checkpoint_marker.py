"""COMPLETE.json, which makes a folder a checkpoint: size and digest of every file, and what is wrong with them.

    {"format": 3, "step": 200, "files": {"trainer.json": {"bytes": 2048, "sha256": "…"}, …}}

A `.safetensors` file's digest is of its header (names, shapes, places, and a `checksum` of each tensor); with the
tensors' checksums that covers every byte, at the speed of memory instead of SHA-256's. No torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fbitrain.base.errors import UserError
from fbitrain.base.files import write_json
from fbitrain.checkpoint_tensors import fault_of_tensors

MARKER = "COMPLETE.json"
FORMAT = 3
FIXED = "fixed.safetensors"  # persistent buffers and frozen parameters, whole, under their own names
LM_CONFIG = "lm_config.json"  # transformers' configuration of a fine-tuned model

_ALWAYS = {"shard_rank00000.safetensors", "data_rank00000.json", "trainer.json", "data_shards.json", "config.yaml"}
_OF_RANK = re.compile(r"shard_rank[0-9]{5}\.safetensors|data_rank[0-9]{5}\.json")
_FOLDER = re.compile(r"step_([0-9]{8})(\.abandoned\+*)?")  # copies may have any name

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_NAMED = 20  # damaged files in a sentence


def write_marker(folder: Path, step: int) -> None:
    """Makes `folder`, in which all else is written, the checkpoint of `step`; it is to be fsynced and named after."""
    files = {name: _entry(folder / name) for name in _found(folder)}
    write_json(folder / MARKER, {"format": FORMAT, "step": step, "files": files})


def require_sound(folder: Path, fault: str) -> None:
    """Raises UserError if `fault`, what `damage` or `damage_of_files` found in the checkpoint, is not empty."""
    if fault:
        raise UserError(f"{folder} is damaged: {fault}; choose another checkpoint")


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, all its bytes read; empty if nothing."""
    return _damage(folder, values=True)


def damage_of_files(folder: Path) -> str:
    """What is wrong with a checkpoint but for its tensors' values: enough before its other files are read; fast."""
    return _damage(folder, values=False)


def _damage(folder: Path, *, values: bool) -> str:
    entries, faults = inventory(folder)
    return told([*faults, *(fault_of_file(folder, name, entry, values=values) for name, entry in entries.items())])


def told(faults: Iterable[str]) -> str:
    """One sentence of what was found, empty strings left out; empty if nothing was."""
    found = [fault for fault in faults if fault]
    more = [f"and {len(found) - _NAMED} more"] if len(found) > _NAMED else []
    return "; ".join([*found[:_NAMED], *more])


def inventory(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The files whose content is to be compared, name -> what COMPLETE.json says of each; and what is wrong already."""
    try:
        return _inventory(folder)
    except _UNREADABLE as error:
        return {}, [f"{type(error).__name__}: {error}"]


def _inventory(folder: Path) -> tuple[dict[str, Any], list[str]]:
    if not (folder / MARKER).exists():
        return {}, [f"it has no {MARKER}"]
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    listed = marker.get("files") if isinstance(marker, dict) else None
    if not isinstance(listed, dict) or not listed:
        return {}, [f"{MARKER} names no files"]
    if marker.get("format") != FORMAT:
        return {}, [
            f"it is of checkpoint format {marker.get('format')}, and this version of fbitrain reads {FORMAT} only"
        ]
    if (named := _FOLDER.fullmatch(folder.name)) and marker.get("step") != int(named[1]):
        return {}, [f"{MARKER} is of step {marker.get('step')}"]
    found = {*_found(folder)}
    faults = [f"{MARKER} does not name {name}" for name in sorted((_ALWAYS | found) - listed.keys())]
    faults += [f"{name} is missing" for name in sorted(listed.keys() - found)]
    return {name: entry for name, entry in sorted(listed.items()) if name in found}, faults


def fault_of_file(folder: Path, name: str, entry: Any, *, values: bool = True) -> str:
    """What is wrong with one file of a checkpoint, of which COMPLETE.json says `entry`; empty if nothing.

    values: all bytes of its tensors are read, too.
    """
    try:
        if (found := _entry(folder / name)) == entry:
            return fault_of_tensors(folder / name) if values and name.endswith(".safetensors") else ""
    except _UNREADABLE as error:
        return f"{name} cannot be read ({type(error).__name__}: {error})"
    sizes = [e.get("bytes") if isinstance(e, dict) else None for e in (found, entry)]
    return f"{name} " + (
        "fails its checksum" if sizes[0] == sizes[1] else f"has {sizes[0]} bytes instead of {sizes[1]}"
    )


def _found(folder: Path) -> list[str]:
    """The names of the files in `folder` that are a checkpoint's; whatever else lies there is nobody's concern."""
    names = {*_ALWAYS, FIXED, LM_CONFIG}
    return sorted(p.name for p in folder.iterdir() if (p.name in names or _OF_RANK.fullmatch(p.name)) and p.is_file())


def _entry(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".safetensors":  # 8 bytes that hold the header's length, then the header
            length = file.read(8)
            content = length + file.read(min(int.from_bytes(length, "little"), size))
        else:
            content = file.read()
    return {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
