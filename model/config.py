"""What a student is: its shape (ModelConfig), how it is binarized (BinarizeConfig), the named presets. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SCALES = ("column", "row", "tensor", "group")
STES = ("identity", "clip")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder. Fields left out of the YAML come from `preset`, then from the defaults here."""

    preset: str = ""  # one of PRESETS; explicit fields win over it
    vocab_size: int = 32000  # must equal the teacher's and the tokenizer's
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int = 0  # 0: as many as n_heads (no grouped-query attention)
    d_model: int = 768
    d_ff: int = 2048  # width of the SwiGLU hidden layer
    max_seq_len: int = 2048  # positions the model is built for, in tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02  # normal initialisation of every matrix


@dataclass(frozen=True)
class BinarizeConfig:
    """How Linears become binary: effective weight α·sign(W) + β (docs/design.md, Numbers)."""

    enabled: bool = True  # false trains the full-precision twin, the paper's baseline
    scale: str = "column"  # pattern of α (and β): column [1,K], row [N,1], tensor [1,1], group [N,K/group_size]
    beta: bool = True  # learn the shift β; must be false for scale=group
    group_size: int = 128  # weights per scale along K; only for scale=group
    ste: str = "identity"  # straight-through estimator: identity (FBI-LLM) or clip (|w| <= 1)
    # Modules kept in full precision, by qualified name or its last component.
    skip: list[str] = field(default_factory=lambda: ["lm_head"])


# From arXiv 2407.07093 and the configurations released with it; `tiny` is ours, for the quickstart.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"n_layers": 4, "n_heads": 4, "d_model": 256, "d_ff": 704, "max_seq_len": 2048},
    "130m": {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 2048, "max_seq_len": 2048},
    "1.3b": {"n_layers": 24, "n_heads": 32, "d_model": 2048, "d_ff": 5632, "max_seq_len": 2048},
    "7b": {"n_layers": 32, "n_heads": 32, "d_model": 4096, "d_ff": 11008, "max_seq_len": 2048},
}


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Yields one sentence per impossible size in `model`."""
    for name in ("vocab_size", "n_layers", "n_heads", "d_model", "d_ff", "max_seq_len"):
        if getattr(model, name) < 1:
            yield f"model.{name}={getattr(model, name)} must be at least 1"
    if model.n_heads > 0:
        if model.d_model % model.n_heads:
            yield f"model.d_model={model.d_model} is not a multiple of model.n_heads={model.n_heads}"
        elif (model.d_model // model.n_heads) % 2:
            head_size = model.d_model // model.n_heads
            yield f"model.d_model/n_heads={head_size} is odd; rotary embeddings need an even head size"
        if model.n_kv_heads < 0 or (model.n_kv_heads and model.n_heads % model.n_kv_heads):
            yield f"model.n_kv_heads={model.n_kv_heads} does not divide model.n_heads={model.n_heads}"
    for name in ("rope_theta", "norm_eps", "init_std"):
        if not getattr(model, name) > 0:
            yield f"model.{name}={getattr(model, name)} must be positive"


def binarize_problems(binarize: BinarizeConfig, model: ModelConfig) -> Iterator[str]:
    """Yields one sentence per contradiction in `binarize`, given the widths of `model`."""
    if binarize.scale not in SCALES:
        yield f"binarize.scale={binarize.scale!r} is unknown; choose one of {', '.join(SCALES)}"
    if binarize.ste not in STES:
        yield f"binarize.ste={binarize.ste!r} is unknown; choose one of {', '.join(STES)}"
    if binarize.scale == "group":
        if binarize.beta:
            yield "binarize.scale=group has no shift (it is the layout of GGUF's Q1_0); set binarize.beta=false"
        if binarize.group_size < 1:
            yield f"binarize.group_size={binarize.group_size} must be at least 1"
        else:
            for name in ("d_model", "d_ff"):
                width, size = getattr(model, name), binarize.group_size
                if width % size:
                    yield f"model.{name}={width} is not a multiple of binarize.group_size={size}"
