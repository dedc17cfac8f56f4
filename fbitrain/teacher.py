"""The teacher: a frozen full-precision language model, from a Hugging Face folder or hub id, or from a GGUF file."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig

from fbitrain.data.errors import DataError
from fbitrain.data.tokenizing.gguf_tokenizer import read_metadata
from fbitrain.errors import UserError
from fbitrain.files import fsync_tree, sha256_of, write_json
from fbitrain.release_tokenizer import write_tokenizer

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
EXPORT_MARKER = "gguf_source.json"  # which GGUF file a folder was made from, and the sizes of what was written
SUPPORTED = "a causal language model of transformers whose logits are the product of its last hidden state and its head"
# What transformers raises on files it cannot make sense of.
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)


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
    model = _load_model(path, dtype, trust_remote_code).requires_grad_(False).eval()
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("the teacher was loaded inside a ZeRO-3 context, which partitioned it; load it before")
    if shard is None:
        model = model.to(device)
    head_VD = _checked_head(model, path)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    body: Callable[..., Any] = model.base_model
    if shard is not None:
        head_VD = head_VD.to(device, copy=True)
        body = shard(model.base_model)
    return Teacher(model.config, head_VD, n_parameters, body)


def teacher_vocab_size(path: str | Path) -> int:
    """The number of words that the teacher at `path` knows, from its config.json or GGUF header; reads no weights.

    Raises UserError if there is no such model.
    """
    where = _locate(path)
    if where is not None and where.is_file():
        return _gguf_vocab_size(where)
    try:  # the bare values: no code that comes with a model is run for this
        values, _ = PretrainedConfig.get_config_dict(where or path)
    except _LOAD_ERRORS as error:
        raise _not_loadable(path, error) from error
    size = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"teacher {path} has no vocab_size in its config.json; it must be {SUPPORTED}")
    return size


def export_gguf(gguf_path: str | Path, out_dir: str | Path) -> bool:
    """Dequantizes a GGUF file once, into a Hugging Face folder: config.json, fp32 model.safetensors, tokenizer files.

    Such a folder loads in a fraction of the time, in any tool. It appears whole or not at all. Returns False, and does
    nothing, if `out_dir` is already what this file gives. Raises UserError if the file cannot be read or the folder
    not be written, or if the folder holds something else.
    """
    gguf_path, out_dir = Path(gguf_path), Path(out_dir)
    if _locate(gguf_path) != gguf_path or not gguf_path.is_file():
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
            f"{out_dir} cannot be written: {_first_line(error)}; make room or choose another folder"
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
        model = _load_gguf(gguf_path, torch.float32)
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


def _load_model(path: str | Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    where = _locate(path)
    if where is not None and where.is_file():
        return _load_gguf(where, dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            where or path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except _LOAD_ERRORS as error:
        raise _not_loadable(path, error) from error
    _require_all_weights(path, info)
    return model


def _load_gguf(path: Path, dtype: torch.dtype) -> Any:
    """The model in a GGUF file with plain weights; transformers by itself would keep some architectures packed."""
    _gguf_vocab_size(path)  # a damaged header is told apart here
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        _require_all_weights(path, info)
        del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict())
    except _LOAD_ERRORS as error:
        raise _not_loadable(path, error) from error
    for parameter in model.parameters():  # model.to(dtype) would round the rotary embedding's buffers too
        parameter.data = parameter.data.to(dtype)
    return model


def _require_all_weights(path: str | Path, info: dict[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"teacher {path} lacks {len(missing)} of its tensors, among them {missing[0]}; get it anew")


@torch.no_grad()
def _checked_head(model: Any, path: str | Path) -> Tensor:
    """The head's weight [V, Dt], after trying on two tokens that logits are nothing but hidden state · headᵀ."""
    kind, head = type(model).__name__, model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(f"teacher {path} is a {kind}, which has no output head; it must be {SUPPORTED}")
    head_VD: Tensor = head.weight.detach()
    token_ids = torch.tensor([[0, 1]], device=head_VD.device)
    logits = model(input_ids=token_ids, use_cache=False).logits.float()
    product = (model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state @ head_VD.t()).float()
    # A bias, a scale or soft-capping changes logits by far more than bf16 rounding does.
    if product.shape != logits.shape or (product - logits).abs().max() > 1e-2 * logits.abs().max():
        raise UserError(f"teacher {path} is a {kind}, which scales, caps or shifts its logits; it must be {SUPPORTED}")
    return head_VD


def _gguf_vocab_size(path: Path) -> int:
    try:
        metadata = read_metadata(str(path), "")
    except DataError:
        raise UserError(f"teacher {path} is damaged, or not a GGUF file; fetch it again") from None
    size = metadata.get(f"{metadata.get('general.architecture')}.vocab_size")
    return int(size) if size else len(metadata.get("tokenizer.ggml.tokens", ()))


def _locate(path: str | Path) -> Path | None:
    """The model's folder or GGUF file, or None if `path` can only be a hub id."""
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(
                f"teacher folder {path} has no config.json; name a Hugging Face folder, hub id or .gguf file"
            )
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise UserError(
                f"teacher {path} is neither a folder nor a .gguf file; name the folder with its config.json"
            )
        return local
    if local.suffix == ".gguf" or not HUB_ID.fullmatch(str(path)):
        raise UserError(f"teacher {path} does not exist; name a Hugging Face folder, a hub id or a .gguf file")
    return None


def _not_loadable(path: str | Path, error: Exception) -> UserError:
    """One sentence for whatever transformers had against the model."""
    message = str(error)
    if "trust_remote_code" in message:
        return UserError(f"teacher {path} brings its own code; set distill.trust_remote_code=true if you trust it")
    if "Unrecognized configuration class" in message or "does not recognize this architecture" in message:
        return UserError(f"teacher {path} is of an unsupported architecture; it must be {SUPPORTED}")
    if _locate(path) is None:
        return UserError(
            f"teacher {path} is neither a folder nor a .gguf file here, and cannot be had from the Hugging Face hub: "
            f"{_first_line(error)} Correct the name, or download the model and give its folder"
        )
    return UserError(f"teacher {path} cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
