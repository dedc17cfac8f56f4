"""Loading a causal language model in full precision: a Hugging Face folder, a hub id or a GGUF file.

Teachers and the models that fine-tuning starts from are loaded here alike. `role` is what messages call the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.loading.pretrained_shape import HUB_ID, POSITIONS, gguf_settings
from fbitrain.loading.sane_settings import require_sane

TEACHER = "teacher"
SUPPORTED = "a causal language model of transformers whose logits are the product of its last hidden state and its head"
SOFT_CAP = re.compile(r"logits?_soft_?cap")
LARGE_LOGITS = 1e4  # far beyond any cap, and finite in float16
# What transformers raises on files it cannot make sense of.
LOAD_ERRORS = (
    *(OSError, EOFError, ValueError, RuntimeError, LookupError, ImportError, TypeError, AttributeError),
    *(ArithmeticError, AssertionError, MemoryError, SafetensorError, UnpicklingError, StrictDataclassError),
)


def load_language_model(
    path: str | Path, dtype: torch.dtype, *, role: str = TEACHER, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model at `path` on the CPU, with plain weights in `dtype` and dropout switched off.

    Raises UserError, one sentence, if there is no such model, if it cannot be loaded or lacks weights.
    """
    where = locate(path, role)
    if where is not None and where.is_file():
        return load_gguf(where, dtype, role=role)
    read_hf_config(path, role)  # refuses what makes no model
    try:
        config = without_dropout(AutoConfig.from_pretrained(where or path, trust_remote_code=trust_remote_code))
        model, info = AutoModelForCausalLM.from_pretrained(
            where or path, config=config, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise _not_loadable(path, error, role) from error
    require_all_weights(f"{role} {path}", info)
    _require_finite(path, model, role)
    return model


def load_gguf(path: Path, dtype: torch.dtype, *, role: str = TEACHER) -> PreTrainedModel:
    """The model in a GGUF file with plain weights; transformers by itself would keep some architectures packed."""
    _gguf_vocab_size(path, role)  # a damaged header is told apart here
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
        )
        require_all_weights(f"{role} {path}", info)
        del loaded.config.quantization_config
        model = AutoModelForCausalLM.from_config(
            without_dropout(loaded.config), dtype=torch.float32, trust_remote_code=False
        )
        model.load_state_dict(loaded.state_dict())
    except LOAD_ERRORS as error:
        raise _not_loadable(path, error, role) from error
    for parameter in model.parameters():  # model.to(dtype) would round the rotary embedding's buffers too
        parameter.data = parameter.data.to(dtype)
    _require_finite(path, model, role)
    return model


def without_dropout(config: PretrainedConfig) -> PretrainedConfig:
    """`config` with every dropout probability 0: pretraining has none, and a resumed run would draw others."""
    for name, value in vars(config).items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_pdrop")):
            setattr(config, name, 0.0)
    return config


def vocab_size_of(path: str | Path, role: str = TEACHER) -> int:
    """The number of words that the model at `path` knows, from its config.json or GGUF header; reads no weights.

    Raises UserError if there is no such model.
    """
    where = locate(path, role)
    if where is not None and where.is_file():
        return _gguf_vocab_size(where, role)
    values = read_hf_config(path, role)
    size = values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise UserError(f"{role} {path} has no vocab_size in its config.json; it must be {SUPPORTED}")
    return size


def positions_of(path: str | Path, role: str = TEACHER) -> int | None:
    """How long a sequence the model at `path` can read, as far as its files and its architecture's defaults say.

    None for architectures without positions, such as Mamba. Raises UserError if there is no such model.
    """
    where = locate(path, role)
    if where is not None and where.is_file():
        values = gguf_settings(where, f"{role} {where}")
    else:
        values = read_hf_config(path, role)
    values = {**values, **(values.get("text_config") or {})}
    if known := [values[name] for name in POSITIONS if isinstance(values.get(name), int) and values[name] > 0]:
        return int(known[0])
    model_type = values.get("model_type")
    default = getattr(CONFIG_MAPPING[model_type](), POSITIONS[0], None) if model_type in CONFIG_MAPPING else None
    return default if isinstance(default, int) and default > 0 else None


def read_hf_config(path: str | Path, role: str = TEACHER) -> dict[str, Any]:
    """The bare values of the config.json in a folder or on the hub: no code that comes with a model is run for them.

    Raises UserError if there is no such model, or if it caps its logits.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(locate(path, role) or path)
    except LOAD_ERRORS as error:
        raise _not_loadable(path, error, role) from error
    require_sane(values, f"{role} {path}")
    if name := soft_cap(values):
        raise UserError(f"{role} {path} caps its logits ({name} in its config.json); it must be {SUPPORTED}")
    return dict(values)


@torch.no_grad()
def checked_head(model: PreTrainedModel, path: str | Path, role: str = TEACHER) -> Tensor:
    """The head's weight [V, D], after trying on two tokens that logits are nothing but hidden state · headᵀ.

    A cap on logits is looked for in the configuration too, and by making the two tokens' logits large.

    Raises UserError for a model without a head, with a bias in it, or with other logits.
    """
    kind, head = type(model).__name__, model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(f"{role} {path} is a {kind}, which has no output head; it must be {SUPPORTED}")
    if getattr(head, "bias", None) is not None:  # whatever its values: it would be neither trained nor released
        raise UserError(f"{role} {path} is a {kind}, whose output head has a bias; it must be {SUPPORTED}")
    head_VD: Tensor = head.weight.detach()
    _require_plain_logits(model, path, role)
    return head_VD


def _require_plain_logits(model: PreTrainedModel, path: str | Path, role: str) -> None:
    head = model.get_output_embeddings()
    token_ids = trial_tokens(head.weight.device)
    hidden = model.base_model(input_ids=token_ids, use_cache=False).last_hidden_state
    product = (hidden @ head.weight.t()).float()
    plain = not soft_cap(model.config.to_dict())
    for factor in (1.0, LARGE_LOGITS / max(float(product.abs().max()), 1e-6)):
        logits, multiplied = _logits_times(model, token_ids, factor)
        wanted = product * factor if multiplied else product
        # A bias, a scale or soft-capping changes logits by far more than bf16 rounding does.
        fits = wanted.shape == logits.shape and (wanted - logits).abs().max() <= 1e-2 * wanted.abs().max()
        plain = plain and bool(fits)
    if not plain:
        raise UserError(
            f"{role} {path} is a {type(model).__name__}, which scales, caps or shifts its logits; "
            f"it must be {SUPPORTED}"
        )


def _logits_times(model: PreTrainedModel, token_ids: Tensor, factor: float) -> tuple[Tensor, bool]:
    """The model's logits in fp32 where its head gives `factor` times as much, and whether its head was called at all:
    some architectures multiply with the head's weight themselves."""
    called = False

    def multiply(module: object, inputs: object, output: Tensor) -> Tensor:
        nonlocal called
        called = True
        return output * factor

    with model.get_output_embeddings().register_forward_hook(multiply):
        return model(input_ids=token_ids, use_cache=False).logits.float(), called


def soft_cap(values: Mapping[str, Any]) -> str:
    """The setting of a config.json that caps a model's logits, as Gemma 2's final_logit_softcapping; "" if none does.

    A cap inside of attention is none of the head's.
    """
    for name, value in {**values, **(values.get("text_config") or {})}.items():
        if SOFT_CAP.search(name) and not name.startswith("att") and value:
            return str(name)
    return ""


def trial_tokens(device: torch.device) -> Tensor:
    """int64 [1, 2]: what a model is tried on."""
    return torch.tensor([[0, 1]], device=device)


def locate(path: str | Path, role: str = TEACHER) -> Path | None:
    """The model's folder or GGUF file, or None if `path` can only be a hub id."""
    local = Path(path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(
                f"{role} folder {path} has no config.json; name a Hugging Face folder, hub id or .gguf file"
            )
        return local
    if local.is_file():
        if local.suffix != ".gguf":
            raise UserError(f"{role} {path} is neither a folder nor a .gguf file; name the folder with its config.json")
        return local
    if local.suffix == ".gguf" or not HUB_ID.fullmatch(str(path)):
        raise UserError(f"{role} {path} does not exist; name a Hugging Face folder, a hub id or a .gguf file")
    return None


def first_line(error: Exception) -> str:
    """What a library's error says in its first line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def require_all_weights(what: str, info: dict[str, Any]) -> None:
    """Raises UserError if the loading `info` of transformers says that the model `what` lacks some of its tensors."""
    if missing := sorted(info["missing_keys"]):  # transformers would fill them with random numbers
        raise UserError(f"{what} lacks {len(missing)} of its tensors, among them {missing[0]}; get it anew")


@torch.no_grad()
def _require_finite(path: str | Path, model: PreTrainedModel, role: str) -> None:
    for name, parameter in model.named_parameters():
        # The extremes of a tensor with a NaN are NaN; unlike isfinite they take no memory of the tensor's size.
        if parameter.numel() and not torch.stack(torch.aminmax(parameter)).isfinite().all():
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"{role} {path} has a weight in {name} that is not finite in {dtype}; get it anew")


def _gguf_vocab_size(path: Path, role: str) -> int:
    sizes = gguf_settings(path, f"{role} {path}")
    return int(sizes.get("vocab_size") or len(sizes.get("tokenizer.ggml.tokens", ())))


def _not_loadable(path: str | Path, error: Exception, role: str) -> UserError:
    """One sentence for whatever transformers had against the model."""
    message = str(error)
    if "trust_remote_code" in message:
        mend = "set distill.trust_remote_code=true if you trust it" if role == TEACHER else f"it must be {SUPPORTED}"
        return UserError(f"{role} {path} brings its own code; {mend}")
    if "Unrecognized configuration class" in message or "does not recognize this architecture" in message:
        return UserError(f"{role} {path} is of an unsupported architecture; it must be {SUPPORTED}")
    if locate(path, role) is None:
        return UserError(
            f"{role} {path} is neither a folder nor a .gguf file here, and cannot be had from the Hugging Face hub: "
            f"{first_line(error)} Correct the name, or download the model and give its folder"
        )
    return UserError(f"{role} {path} cannot be loaded: {first_line(error)}")
