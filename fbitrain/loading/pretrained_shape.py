"""The shape of a model that fine-tuning starts from, read before it is loaded: no torch.

A folder's config.json, a run's config.yaml and a GGUF file's header say it; a hub id says nothing until it is fetched.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fbitrain.base.errors import UserError
from fbitrain.data.tokenizing.gguf_tokenizer import read_metadata

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
KEPT_TOKENIZER = "tokenizer"  # the folder in a run that keeps its tokenizer's files
PACKED_MODEL_TYPE = "fbitrain_"  # what the model_type of packed folders starts with
# ModelConfig's field -> what architectures call it in their config.json. In GGUF the names follow the architecture's.
_NAMES = {
    "vocab_size": ("vocab_size",),
    "n_layers": ("num_hidden_layers", "n_layer", "num_layers", "block_count"),
    "n_heads": ("num_attention_heads", "n_head", "num_heads", "attention.head_count"),
    "n_kv_heads": ("num_key_value_heads", "attention.head_count_kv"),
    "d_model": ("hidden_size", "n_embd", "d_model", "embedding_length"),
    "d_ff": ("intermediate_size", "n_inner", "ffn_dim", "feed_forward_length"),
    "max_seq_len": ("max_position_embeddings", "n_positions", "context_length"),
}
POSITIONS = _NAMES["max_seq_len"]
SIZES = tuple(_NAMES)  # the fields of ModelConfig that a pretrained model fixes


def read_shape(where: str) -> dict[str, int]:
    """The sizes of the model at `where` as fields of ModelConfig; what cannot be known yet is left out.

    Raises UserError if there is something at `where` that fine-tuning cannot start from, or if there is nothing and
    the name cannot be a hub id.
    """
    path = Path(where).expanduser()
    if path.is_file():
        return _gguf_shape(path)
    if (path / "config.json").is_file():
        return shape_of(_read(path / "config.json"))
    if checkpoint_config := run_config(path):
        model = _read(checkpoint_config).get("model", {})
        return {name: model[name] for name in SIZES if name in model}
    if path.is_dir():
        raise UserError(_no_model(path))
    if path.suffix == ".gguf" or not HUB_ID.fullmatch(where):
        raise UserError(
            f"model.pretrained={where} does not exist; name a Hugging Face folder, a hub id, a .gguf file, "
            "or one of your runs or checkpoints"
        )
    return {}


def shape_of(hf_config: Mapping[str, Any]) -> dict[str, int]:
    """The same from the values of a transformers config; sizes that it does not give are left out."""
    if str(hf_config.get("model_type")).startswith(PACKED_MODEL_TYPE):
        raise UserError(
            "model.pretrained is a packed release, which holds signs and no latent weights; "
            "name the run or checkpoint that it was made from"
        )
    values = {**hf_config, **(hf_config.get("text_config") or {})}
    shape = {}
    for name, aliases in _NAMES.items():
        found = [values[alias] for alias in aliases if isinstance(values.get(alias), int)]
        if found:
            shape[name] = found[0]
    if "n_inner" in values and "d_model" in shape:  # GPT-2's, whose null means four times the width
        shape.setdefault("d_ff", 4 * shape["d_model"])
    return shape


def run_config(path: Path) -> Path | None:
    """The config.yaml of a run's or a checkpoint's folder, or None if `path` is neither."""
    if ((path / "checkpoints").is_dir() or (path / "COMPLETE.json").is_file()) and (path / "config.yaml").is_file():
        return path / "config.yaml"
    return None


def is_binary_run(where: str) -> bool:
    """Whether `where` is a run or checkpoint of ours that is binary at every step, and so is continued as it is.

    What a run with phases of precision is depends on its checkpoint: fbitrain.fine_tune looks there.
    """
    found = run_config(Path(where).expanduser()) if where else None
    if found is None:
        return False
    binarize = _read(found).get("binarize", {})
    return bool(binarize.get("enabled", True)) and not (binarize.get("from_step") or binarize.get("anneal_steps"))


def origins(where: str) -> tuple[str, str]:
    """The teacher and the tokenizer that go with the model at `where`, as `distill.teacher` and `data.tokenizer`.

    Those of the run, where it is one of ours; else the model is its own teacher, with its own tokenizer.
    """
    found = run_config(Path(where).expanduser())
    if found is None:
        return where, "teacher"
    saved = _read(found)
    run_dir = found.parent if (found.parent / "checkpoints").is_dir() else found.absolute().parents[2]
    tokenizer = kept_tokenizer(run_dir) or saved.get("data", {}).get("tokenizer", "teacher")
    return saved.get("distill", {}).get("teacher", ""), tokenizer


def kept_tokenizer(run_dir: Path) -> str:
    """The folder with the tokenizer's files in a run; empty if it has none, as runs of earlier versions."""
    return str(run_dir / KEPT_TOKENIZER) if (run_dir / KEPT_TOKENIZER).is_dir() else ""


def _gguf_shape(path: Path) -> dict[str, int]:
    if path.suffix != ".gguf":
        raise UserError(f"model.pretrained={path} is neither a folder nor a .gguf file; name the model's folder")
    values = gguf_settings(path, f"model.pretrained={path}")
    shape = shape_of(values)
    if tokens := values.get("tokenizer.ggml.tokens"):
        shape.setdefault("vocab_size", len(tokens))
    return shape


def gguf_settings(path: Path, what: str) -> dict[str, Any]:
    """What a GGUF file's header says, the architecture's own entries without its name in front.

    `what` the file is called in the UserError for one that is damaged.
    """
    try:
        metadata = read_metadata(str(path), "")
    except UserError:
        raise UserError(f"{what} is damaged, or not a GGUF file; fetch it again") from None
    prefix = f"{metadata.get('general.architecture')}."
    return {key.removeprefix(prefix): value for key, value in metadata.items()}


def _read(path: Path) -> Mapping[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}); get the model anew") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; get the model anew")
    return values


def _no_model(path: Path) -> str:
    if (path / "dense" / "config.json").is_file():
        return f"model.pretrained={path} holds several forms of a model; name {path / 'dense'}"
    return f"model.pretrained={path} holds no model: it has neither a config.json nor checkpoints"
