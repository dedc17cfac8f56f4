"""A GGUF file dequantized once, into a Hugging Face folder that loads in a fraction of the time, in any tool."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from fbitrain.base.errors import UserError
from fbitrain.base.files import give_usual_mode, replacing_folder, sha256_of, write_json
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.loading.language_model import TEACHER, first_line, load_gguf, locate
from fbitrain.loading.tokenizer_folder import prompt_start, write_tokenizer

EXPORT_MARKER = "gguf_source.json"  # which GGUF file a folder was made from, and the sizes of what was written


def export_gguf(gguf_path: str | Path, out_dir: str | Path, *, role: str = TEACHER) -> bool:
    """Makes `out_dir` of a GGUF file: config.json, fp32 model.safetensors, tokenizer files; whole or not at all.

    Returns False, and does nothing, if `out_dir` is already what this file gives. Raises UserError, which calls the
    model by its `role`, if the file cannot be read or the folder not be written, or if the folder holds something else.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    if locate(gguf_path, role) != gguf_path or not gguf_path.is_file():
        raise UserError(f"{gguf_path} is not a .gguf file")
    sha256 = sha256_of(gguf_path)
    if is_export_of(out_dir, sha256):
        return False
    require_replaceable(out_dir)
    try:
        with replacing_folder(out_dir) as folder:
            _write_export(gguf_path, sha256, folder, role)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out_dir} cannot be written: {first_line(error)}; make room or choose another folder"
        ) from error
    return True


def require_replaceable(out_dir: Path) -> None:
    """Raises UserError if something is at `out_dir` that is neither an export nor an empty folder."""
    if (
        out_dir.exists()
        and not (out_dir / EXPORT_MARKER).is_file()
        and (not out_dir.is_dir() or any(out_dir.iterdir()))
    ):
        raise UserError(f"{out_dir} exists and was not made from a GGUF file; remove it or choose another folder")


def is_export_of(folder: Path, sha256: str) -> bool:
    """Whether `folder` is the complete export of the GGUF file with this checksum."""
    try:
        marker = json.loads((folder / EXPORT_MARKER).read_text(encoding="utf-8"))
        return bool(marker["sha256"] == sha256) and marker["sizes"] == _sizes(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_export(gguf_path: Path, sha256: str, folder: Path, role: str) -> None:
    with tqdm(total=3, desc=f"export {gguf_path.name}", unit="part") as progress:
        model = load_gguf(gguf_path, torch.float32, role=role)
        progress.update()
        model.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):
            give_usual_mode(file)
        progress.update()
        tokenizer = load_tokenizer(gguf_path)
        positions = getattr(model.config, "max_position_embeddings", None)
        write_tokenizer(tokenizer, folder, add_bos=bool(prompt_start(tokenizer, folder)), max_length=positions)
        write_json(folder / EXPORT_MARKER, {"source": gguf_path.name, "sha256": sha256, "sizes": _sizes(folder)})
        progress.update()


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != EXPORT_MARKER}
