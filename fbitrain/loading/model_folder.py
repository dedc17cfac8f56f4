"""Opening a model that is already there: a released folder, any Hugging Face folder, or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.data.tokenizer import Tokenizer, check_special, load_tokenizer
from fbitrain.loading.gguf_export import export_gguf
from fbitrain.loading.language_model import LOAD_ERRORS, first_line, require_all_weights
from fbitrain.loading.sane_settings import require_sane
from fbitrain.loading.tokenizer_folder import prompt_start
from fbitrain.model.compiled import PackedLlama, level_for, why_not_compiled
from fbitrain.model.hf import register

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Pretrained:
    """A model with its own tokenizer, and the folder both came from, valid while `open_model` is.

    `prompt_start` has the ids that stand before every prompt (`tokenizer_folder.prompt_start`).
    `runs_on` says in a few words what computes it, and why not the compiled decoder if that does not.
    """

    lm: PreTrainedModel | PackedLlama
    tokenizer: Tokenizer
    prompt_start: list[int]
    folder: Path
    runs_on: str


@contextmanager
def open_model(
    path: Path,
    dtype: str = "float32",
    device: str | None = None,
    *,
    activations: str = "float",
    transformers_only: bool = False,
) -> Iterator[Pretrained]:
    """The model at `path` (see `model_folder`) on `device`, by default a GPU if there is one.

    A packed folder runs on the compiled decoder where that can run it (`why_not_compiled`) unless `transformers_only`;
    anything else is a transformers model (`load_lm`). activations: "int8" needs the compiled decoder (`PackedLlama`).
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with model_folder(path) as folder:
        tokenizer = load_tokenizer(path if path.is_file() else folder)
        lm, runs_on = _load(folder, DTYPES[dtype], device, activations, transformers_only)
        _check_specials(lm, folder)
        yield Pretrained(lm, tokenizer, prompt_start(tokenizer, folder), folder, runs_on)


def _check_specials(lm: PreTrainedModel | PackedLlama, folder: Path) -> None:
    """Raises UserError for a BOS or EOS token, as generation takes them, that the model has no embedding for."""
    file = folder / "generation_config.json"
    for kind in ("bos", "eos"):
        ids = getattr(lm.generation_config, f"{kind}_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            check_special(token_id, kind, file if file.is_file() else folder / "config.json", lm.config.vocab_size)


def _load(
    folder: Path, dtype: torch.dtype, device: str, activations: str, transformers_only: bool
) -> tuple[PreTrainedModel | PackedLlama, str]:
    """The model, and `Pretrained.runs_on`."""
    config = read_config(folder)
    with _one_sentence(folder):
        level = level_for(config) if device == "cpu" else ""  # asking compiles the CPU kernels
        why_not = "transformers is asked for" if transformers_only else why_not_compiled(config, device, dtype, level)
        if not why_not:
            return PackedLlama(folder, config, activations), f"compiled decoder ({level}, {activations} activations)"
    if activations != "float":
        raise UserError(f"activations={activations} needs the compiled decoder, which does not run {folder}: {why_not}")
    return load_lm(folder, dtype, device), f"transformers ({why_not})"


def read_config(folder: Path) -> PretrainedConfig:
    """The config of the model in `folder`, packed or not. Raises UserError; code that comes with it is never run."""
    with _one_sentence(folder):
        _register_if_packed(folder)
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config


@contextmanager
def model_folder(path: Path) -> Iterator[Path]:
    """Yields the Hugging Face folder of the model at `path`; a GGUF file is unpacked into a temporary one.

    Raises UserError where there is no model, saying what there is instead.
    """
    if path.is_file() and path.suffix == ".gguf":
        with TemporaryDirectory(prefix="fbitrain-gguf-") as folder:
            export_gguf(path, Path(folder), role="model")
            yield Path(folder)
    elif (path / "config.json").is_file():
        yield path
    else:
        raise UserError(_no_model(path))


def load_lm(folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The language model in `folder`, in eval mode. Packed folders compute from their bits; their scales stay fp32.

    Raises UserError if it cannot be loaded whole. Code that comes with a folder is never run.
    """
    with _one_sentence(folder):
        _register_if_packed(folder)
        # Without ignore_mismatched_sizes a wrong shape raises; a missing tensor would only be warned about.
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    require_all_weights(f"model {folder}", info)
    return model.to(device).eval()


def _register_if_packed(folder: Path) -> None:
    values, _ = PretrainedConfig.get_config_dict(folder)
    require_sane(values, str(folder))
    register(values.get("model_type") or "")


@contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    try:
        yield
    except LOAD_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{folder} brings its own code, which is never run; give another model") from error
        raise UserError(f"{folder} cannot be loaded as a language model: {first_line(error)}") from error


def _no_model(path: Path) -> str:
    if not path.exists():
        return f"{path} does not exist; give a model folder such as releases/NAME/packed, or a .gguf file"
    if formats := sorted(child.parent for child in path.glob("*/config.json")):
        return f"{path} holds several models; name one of them: {', '.join(map(str, formats))}"
    if (path / "checkpoints").is_dir() or (path / "COMPLETE.json").is_file():
        return f"{path} holds checkpoints, not a model; release it first: fbitrain release {path} --out FOLDER"
    return f"{path} holds no model: it is neither a .gguf file nor a folder with a config.json"
