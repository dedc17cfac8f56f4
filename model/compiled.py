"""A packed release on the compiled decoder: its tensors stay in their files, mapped into memory, and nothing is copied
but, with AVX2, the bits: in the order in which single tokens are multiplied fastest.

`why_not_compiled` says which models that runs; transformers runs the others (fbitrain.model.hf).

B sequences, T tokens, M tokens in one list, D width, V vocabulary, N out_features, K in_features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fbitrain.base.errors import UserError
from fbitrain.kernels.decoder import Decoder, NotFiniteError, compiled_level
from fbitrain.kernels.decoder_tensors import BinaryTensors, DecoderShape, DecoderTensors, LayerTensors
from fbitrain.model.hf import BinaryLlamaConfig

LINEARS = {
    **{"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"},
    **{"output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}


def why_not_compiled(config: LlamaConfig, device: str, dtype: torch.dtype, level: str) -> str:
    """Why the model that `config` describes does not run on the compiled decoder, "" if it does.

    `level` is what `compiled_level` gives for the model's scales. The decoder computes in fp32, on the CPU.
    """
    if not isinstance(config, BinaryLlamaConfig) or not config.binarize:
        return "the model is not a packed Llama"
    if config.binarize["layer"] != "binary" or config.binarize["own_options"]:
        return f"its layers are {config.binarize['layer']} ones, not plain signs with scales"
    if config.binarize["options"]["int8"]:
        return "its layers round their inputs to int8 as part of their function"
    if torch.device(device).type != "cpu":
        return f"only for cpu, not {device}"
    if dtype is not torch.float32:
        return f"only for float32, not {str(dtype).removeprefix('torch.')}"
    if config.binarize["skip"] != ["lm_head"]:
        return f"skip={config.binarize['skip']} keeps other Linears than lm_head in full precision, or none"
    if rope_type(config) != "default":
        return f"rope_type={rope_type(config)!r} is not the default"
    if config.hidden_act != "silu" or config.attention_bias or config.mlp_bias:
        return "its layers are not plain Llama's (hidden_act, attention_bias, mlp_bias)"
    if not level:
        return "no compiled kernel runs its scales here (see fbitrain doctor)"
    return ""


def rope_type(config: LlamaConfig) -> str:
    """ "default" where positions are not rescaled."""
    return str((config.rope_parameters or {}).get("rope_type", "default"))


def level_for(config: LlamaConfig) -> str:
    """The kernels' level that a packed `config` would run on, "" if none or if it is not packed. Builds the kernels."""
    if not isinstance(config, BinaryLlamaConfig) or not config.binarize or config.binarize["layer"] != "binary":
        return ""
    options = config.binarize["options"]
    return compiled_level(options["scale"], options.get("group_size", 0))


class PackedLlama:
    """The packed model in `folder`, for inference on the CPU in fp32. `config` and `generation_config` are its own.

    `activations`: "float" computes the function that was trained; "int8" rounds each binary Linear's input to 8 bits
    per token, which is faster. Raises UserError where the folder's files are damaged or do not fit its config.
    """

    def __init__(self, folder: Path, config: Any, activations: str = "float") -> None:
        self.config, self.device = config, torch.device("cpu")
        try:
            self.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except OSError:  # a folder may do without; transformers then takes these from config.json, too
            self.generation_config = GenerationConfig.from_model_config(config)
        try:
            self.decoder = Decoder(decoder_shape(config), decoder_tensors(config, mapped_tensors(folder)), activations)
        except KeyError as error:
            raise UserError(f"{folder} lacks its model's tensor {error.args[0]}; get it anew") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be loaded as a packed model: {error}; get it anew") from error

    def continuation(self, n_tokens: int) -> Continuation:
        """An empty text with room for `n_tokens`."""
        return Continuation(self.decoder, n_tokens)

    def hidden(self, ids: Tensor) -> Tensor:
        """ids [B,T] -> what the head is given, fp32 [B,T,D]; sequences one by one."""
        with _refusing_non_finite():
            return torch.stack([self.decoder.hidden(row, self.decoder.new_cache(len(row))) for row in ids])

    def head(self, hidden: Tensor) -> Tensor:
        """hidden fp32 [M,D] -> logits fp32 [M,V]."""
        return self.decoder.logits(hidden)


class Continuation:
    """One text, whose tokens so far the model has read. Its methods read the next `ids` and say what follows them."""

    def __init__(self, decoder: Decoder, n_tokens: int) -> None:
        self._decoder, self._cache = decoder, decoder.new_cache(n_tokens)

    def logits(self, ids: list[int]) -> Tensor:
        """The logits [V] after `ids`."""
        return self._decoder.logits(self._hidden(ids))[0]

    def likeliest(self, ids: list[int]) -> int:
        """The first token with the largest of them, without computing all."""
        hidden = self._hidden(ids)
        if not hidden.isfinite().all():
            raise UserError("the model's hidden states are not finite: its weights are damaged, or training diverged")
        return self._decoder.likeliest(hidden)

    def read(self, ids: list[int]) -> None:
        """Nothing is said of what follows: a part of a long prompt."""
        self._hidden(ids, last=0)

    def _hidden(self, ids: list[int], last: int = 1) -> Tensor:
        with _refusing_non_finite():
            return self._decoder.hidden(torch.tensor(ids, dtype=torch.int64, device="cpu"), self._cache, last=last)


@contextmanager
def _refusing_non_finite() -> Iterator[None]:
    """Says in the user's words what the decoder finds in a diverged model."""
    try:
        yield
    except NotFiniteError as error:
        raise UserError(f"{error}; run the model with --activations float to see what it makes of that") from error


def mapped_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in `folder`, memory-mapped: a page is read when it is first used."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    return tensors


def decoder_shape(config: Any) -> DecoderShape:
    options = (config.binarize or {})["options"]
    return DecoderShape(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_ff=config.intermediate_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocab_size=config.vocab_size,
        norm_eps=config.rms_norm_eps,
        scale=options["scale"],
        group_size=options.get("group_size", 0),
    )


def decoder_tensors(config: Any, tensors: Mapping[str, Tensor]) -> DecoderTensors:
    """The tensors of a packed folder by what they do.

    Raises KeyError with the name of one that is missing, ValueError for one that `config` has no use for (its flags
    are not those of the files) and for scales that are not finite.
    """
    unused = set(tensors)

    def take(name: str) -> Tensor:
        unused.discard(name)
        return tensors[name]

    def scale(name: str) -> Tensor:
        found = take(name)
        if found.numel() and not torch.stack(torch.aminmax(found)).isfinite().all():
            raise ValueError(f"{name} is not finite")
        return found

    has_beta = bool((config.binarize or {})["options"]["beta"])

    def linear(name: str) -> BinaryTensors:
        beta = scale(f"{name}.beta") if has_beta else None
        return BinaryTensors(take(f"{name}.weight_bits"), scale(f"{name}.alpha"), beta)

    layers = []
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        parts: dict[str, Any] = {part: linear(f"{layer}.{name}") for part, name in LINEARS.items()}
        parts |= {part: take(f"{layer}.{name}.weight") for part, name in norms.items()}
        layers.append(LayerTensors(**parts))
    embedding = take("model.embed_tokens.weight")
    head = embedding if config.tie_word_embeddings else take("lm_head.weight")
    final_norm = take("model.norm.weight")
    if unused:
        raise ValueError(f"its files hold {min(unused)}, which its config.json has no place for")
    with torch.device("cpu"):  # whatever the default is
        frequencies = LlamaRotaryEmbedding(config).inv_freq
    return DecoderTensors(
        layers=layers,
        embedding=embedding,
        head=head,
        final_norm=final_norm,
        frequencies=frequencies,
    )
