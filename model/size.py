"""How many parameters a student has, by arithmetic: no torch, nothing allocated.

Letters: N out_features, K in_features, V vocabulary, D student width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from fbitrain.model.config import BinarizeConfig, ModelConfig
from fbitrain.model.storage import storage_bits


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a student, by kind."""

    binary: int  # latent weights of the binary layers, salient ones included
    scales: int  # trained scales: α and β, and experts' scales. Others follow from the weights and are no parameters
    embeddings: int  # token embedding and, unless tied or binary, the output head
    dense: int  # weights of other Linears that binarize.skip keeps in full precision
    norms: int
    routers: int = 0  # of a mixture of scales
    stored_bits: int = 0  # of the binary weights in a release: signs, scales, salient weights, routers

    @property
    def total(self) -> int:
        return self.binary + self.scales + self.embeddings + self.dense + self.norms + self.routers

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per binary weight, its share of everything else included; 32 for a model without binary ones."""
        return self.stored_bits / self.binary if self.binary else 32.0


def count_parameters(model: ModelConfig, binarize: BinarizeConfig) -> ParameterCount:
    """What `build_student(model, binarize, …)` would hold."""
    binary = scales = routers = stored_bits = dense = 0
    embeddings = model.vocab_size * model.d_model
    for name, n, k in linear_shapes(model):
        if binarize.enabled and skip_entry(name, binarize.skip) is None:
            binary += n * k
            scales += binarize.traits.n_scales(binarize, n, k) if binarize.traits.scales else 0
            routers += binarize.n_experts * k if binarize.traits.routed else 0
            stored_bits += sum(storage_bits(binarize, n, k).values())
        elif name == "lm_head":
            embeddings += n * k
        else:
            dense += n * k
    norms = (2 * model.n_layers + 1) * model.d_model
    return ParameterCount(binary, scales, embeddings, dense, norms, routers, stored_bits)


def frozen_parameters(model: ModelConfig, kinds: Collection[str]) -> int:
    """How many of a Llama's parameters train.frozen keeps; other kinds than these a Llama has none of."""
    table = model.vocab_size * model.d_model
    counts = {
        "embeddings": table,
        "head": 0 if model.tie_embeddings else table,
        "norms": (2 * model.n_layers + 1) * model.d_model,
    }
    return sum(counts.get(kind, 0) for kind in kinds)


def linear_shapes(model: ModelConfig) -> Iterator[tuple[str, int, int]]:
    """(name, N, K) of every Linear of a LlamaForCausalLM that has a weight of its own."""
    d, kv = model.d_model, model.d_model // model.n_heads * (model.n_kv_heads or model.n_heads)
    for layer in range(model.n_layers):
        for name, n, k in (
            ("self_attn.q_proj", d, d),
            ("self_attn.k_proj", kv, d),
            ("self_attn.v_proj", kv, d),
            ("self_attn.o_proj", d, d),
            ("mlp.gate_proj", model.d_ff, d),
            ("mlp.up_proj", model.d_ff, d),
            ("mlp.down_proj", d, model.d_ff),
        ):
            yield f"model.layers.{layer}.{name}", n, k
    if not model.tie_embeddings:
        yield "lm_head", model.vocab_size, d


def skip_entry(name: str, skip: Sequence[str]) -> str | None:
    """The entry of binarize.skip that keeps module `name` in full precision (exact, or its last component), or None."""
    return next((entry for entry in skip if entry in (name, name.rpartition(".")[2])), None)
