"""The teacher: a frozen full-precision language model, from a Hugging Face folder or hub id, or from a GGUF file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from fbitrain.errors import UserError
from fbitrain.files import fsync_tree, sha256_of, write_json
from fbitrain.language_model import checked_head, first_line, load_gguf, load_language_model, locate
from fbitrain.release_tokenizer import write_tokenizer

EXPORT_MARKER = "gguf_source.json"  # which GGUF file a folder was made from, and the sizes of what was written


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen model in eval mode. Not a Module, so no student, optimizer or checkpoint can ever take it for a part."""

    config: Any  # the model's transformers config
    head_weight: Tensor  # [V, Dt], whole on every rank; shares memory with the embedding where the head is tied
    n_parameters: int  # a tied head counts once
    body: Callable[..., Any]  # token ids to last hidden state; a wrapper where the teacher is sharded

    @property
    def vocab_size(self) -> int:
        return len(self.head_weight)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor) -> Tensor:
        """The last hidden state after the final norm, [B, T, Dt], for token ids int64 [B, T]."""
        hidden_BTD: Tensor = self.body(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden_BTD

    @torch.no_grad()
    def hints(self, input_ids: Tensor, *, with_states: bool) -> tuple[Any, ...]:
        """What Student.forward is told: the last hidden state, the head and, if asked, what every block returned.

        The states are [B, T, Dt] each, the last one after the final norm.
        """
        output = self.body(input_ids=input_ids, use_cache=False, output_hidden_states=with_states)
        states = (output.hidden_states[1:],) if with_states else ()  # the first is the embedding
        return output.last_hidden_state, self.head_weight, *states

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T, V], for evaluation of a few sequences; training never forms them (fbitrain.distill)."""
        return self.hidden(input_ids) @ self.head_weight.t()


def load_teacher(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    shard: Callable[[nn.Module], Callable[..., Any]] | None = None,
) -> Teacher:
    """Loads the teacher at `path` and freezes it.

    Without `shard` every rank holds the whole model on `device`; on a CPU, weights stored in `dtype` stay mapped from
    the file, and the ranks of a machine share them. With `shard` (distill.host=zero3) the model's body, still on the
    CPU, is passed through it, and it returns what is called instead. The head is needed whole at every step, so
    it is not sharded: it stays on `device`, copied if it is tied to the embedding.

    Raises UserError if there is no such model, if it lacks weights, or if its logits are anything but hidden · headᵀ.
    Raises RuntimeError while an HfDeepSpeedConfig for ZeRO-3 is alive, which makes transformers take the weights apart:
    load the teacher before it is made.
    """
    model = load_language_model(path, dtype, trust_remote_code=trust_remote_code).requires_grad_(False).eval()
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("the teacher was loaded inside a ZeRO-3 context, which partitioned it; load it before")
    if shard is None:
        model = model.to(device)
    head_VD = checked_head(model, path)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    body: Callable[..., Any] = model.base_model
    if shard is not None:
        head_VD = head_VD.to(device, copy=True)
        body = shard(model.base_model)
    return Teacher(model.config, head_VD, n_parameters, body)


def export_gguf(gguf_path: str | Path, out_dir: str | Path) -> bool:
    """Dequantizes a GGUF file once, into a Hugging Face folder: config.json, fp32 model.safetensors, tokenizer files.

    Such a folder loads in a fraction of the time, in any tool. It appears whole or not at all. Returns False, and does
    nothing, if `out_dir` is already what this file gives. Raises UserError if the file cannot be read or the folder
    not be written, or if the folder holds something else.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    if locate(gguf_path) != gguf_path or not gguf_path.is_file():
        raise UserError(f"{gguf_path} is not a .gguf file")
    sha256 = sha256_of(gguf_path)
    if is_export_of(out_dir, sha256):
        return False
    if (
        out_dir.exists()
        and not (out_dir / EXPORT_MARKER).is_file()
        and (not out_dir.is_dir() or any(out_dir.iterdir()))
    ):
        raise UserError(f"{out_dir} exists and was not made from a GGUF file; remove it or choose another folder")
    building = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    try:
        building.mkdir(parents=True)
        _write_export(gguf_path, sha256, building)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        building.replace(out_dir)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out_dir} cannot be written: {first_line(error)}; make room or choose another folder"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def is_export_of(folder: Path, sha256: str) -> bool:
    """Whether `folder` is the complete export of the GGUF file with this checksum."""
    try:
        marker = json.loads((folder / EXPORT_MARKER).read_text(encoding="utf-8"))
        return bool(marker["sha256"] == sha256) and marker["sizes"] == _sizes(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_export(gguf_path: Path, sha256: str, folder: Path) -> None:
    with tqdm(total=3, desc=f"export {gguf_path.name}", unit="part") as progress:
        model = load_gguf(gguf_path, torch.float32)
        progress.update()
        write_tokenizer(str(gguf_path), folder)
        progress.update()
        model.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner can read
        write_json(folder / EXPORT_MARKER, {"source": gguf_path.name, "sha256": sha256, "sizes": _sizes(folder)})
        fsync_tree(folder)
        progress.update()


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.name != EXPORT_MARKER}
