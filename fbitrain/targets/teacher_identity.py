"""Which teacher a cache is of: its name, and a fingerprint of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fbitrain.base.errors import UserError
from fbitrain.targets.cache_folder import CacheSettings

WEIGHTS = (".safetensors", ".bin", ".gguf")
SAMPLES, SAMPLE_BYTES = 256, 4096  # of each file: a megabyte in all, whatever the model's size


def teacher_fingerprint(path: Path) -> str:
    """Of the model at `path`, a folder or a GGUF file: a hash of its configuration, of its weights' sizes, and of
    samples of them all over the files. "" where no weights are.
    """
    files = [path] if path.is_file() else sorted(found for found in path.glob("*") if found.suffix in WEIGHTS)
    if not files:
        return ""
    digest = hashlib.sha256()
    config = path / "config.json"
    if config.is_file():
        digest.update(config.read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name if path.is_dir() else ''}/{size}".encode())
        with file.open("rb") as opened:
            for i in range(SAMPLES):
                opened.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def require_same_teacher(settings: CacheSettings, teacher: str) -> None:
    """Raises UserError where `teacher`, if one is named, is not the one whose targets the cache holds.

    A teacher that is not on this machine is known by its name.
    """
    if not teacher:
        return
    fingerprint = teacher_fingerprint(Path(teacher)) if settings.teacher_fingerprint else ""
    same = fingerprint == settings.teacher_fingerprint if fingerprint else teacher == settings.teacher
    if not same:
        raise UserError(
            f"distill.cache holds the targets of {settings.teacher}, which is another model than distill.teacher="
            f"{teacher}; name that one, or write the cache anew"
        )
