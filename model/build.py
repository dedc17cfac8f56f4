"""From a config to a binary Llama, and from any Hugging Face model to a binary one: Linears swapped by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fbitrain.model.config import BinarizeConfig, ModelConfig
from fbitrain.model.methods import FullLinear, make_layer
from fbitrain.model.refusals import check_fused, check_linears, check_masks, check_skip, fused_modules
from fbitrain.model.size import skip_entry
from fbitrain.model.storage import storage_bits


@dataclass(frozen=True)
class BinarizeReport:
    """What became binary; str() is one line for the log."""

    binarized: tuple[str, ...]  # qualified names of the swapped Linears
    kept: Mapping[str, str]  # name of each other Linear -> the rule that kept it
    n_binary_weights: int
    n_kept_weights: int
    stored_bits: int  # of all binary weights in a release, scales and salient weights included

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per binary weight; 32 if there is none."""
        return self.stored_bits / self.n_binary_weights if self.n_binary_weights else 32.0

    def __str__(self) -> str:
        n_linears = len(self.binarized) + len(self.kept)
        weights = _abbreviate(self.n_binary_weights)
        bits = f", {self.bits_per_weight:.3f} bits each" if self.binarized else ""
        line = f"binarized {len(self.binarized)}/{n_linears} Linear layers ({weights} weights{bits})"
        for rule in dict.fromkeys(self.kept.values()):
            names = [name for name, kept_by in self.kept.items() if kept_by == rule]
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            line += f"; kept {', '.join(names[:2])}{more} (rule: {rule})"
        return line


def llama_config(model: ModelConfig) -> LlamaConfig:
    """The same shape in Hugging Face's words."""
    return LlamaConfig(
        vocab_size=model.vocab_size,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads or model.n_heads,
        hidden_size=model.d_model,
        intermediate_size=model.d_ff,
        max_position_embeddings=model.max_seq_len,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        rms_norm_eps=model.norm_eps,
        tie_word_embeddings=model.tie_embeddings,
        initializer_range=model.init_std,
    )


def build_student(model: ModelConfig, binarize: BinarizeConfig, seed: int) -> tuple[LlamaForCausalLM, BinarizeReport]:
    """A freshly initialised fp32 student; the same `seed` gives the same weights, and torch's own state is left alone.

    Every matrix is normal with standard deviation `model.init_std`; α and β start from those weights. Under DeepSpeed's
    zero.Init the parameters come out partitioned, in its dtype.
    """
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        # from_config, not the class itself: it keeps the initial weights right where ZeRO-3 partitions while building.
        config = llama_config(model)
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
        )
        report = binarize_(lm, binarize, init_std=model.init_std)
    _set_rotary_frequencies(lm, model)
    return lm, report


def binarize_(
    model: nn.Module,
    binarize: BinarizeConfig,
    *,
    init_std: float = 0.0,
    masks: Mapping[str, Tensor] | None = None,
) -> BinarizeReport:
    """Swaps the Linears of `model`, and GPT-2's Conv1Ds, for layers of binarize.method in place, but for binarize.skip.

    A layer keeps its weight's values, dtype and device, and its bias; its scales start from them. Weights that are not
    here (on the meta device, or partitioned by ZeRO-3) are drawn anew with standard deviation `init_std`; 0 refuses
    them. Routers are drawn from torch's global generator. Nothing has been swapped when this raises.

    Args:
        masks: of methods with salient weights, by layer name: bool [out_features, in_features], True for salient ones.

    Raises:
        UserError: a skip name matches nothing; a Linear shares its weight with another module, is quantized, is not a
            multiple of the group size wide, has no values and `init_std` is 0, or no fitting mask; a module holds
            several Linears in one tensor.
    """
    linears = _linears(model)
    if not binarize.enabled:
        return _report({}, linears, dict.fromkeys(linears, "binarize.enabled=false"))
    chosen = chosen_linears(model, binarize, values_needed=init_std == 0)
    check_masks(chosen, binarize, masks)
    rules = {name: f"skip=[{skip_entry(name, binarize.skip)}]" for name in linears if name not in chosen}
    stored = 0
    for name, linear in chosen.items():
        mask = masks[name] if masks and name in masks else None
        model.set_submodule(name, make_layer(linear, binarize, mask, init_std))
        n_salient = None if mask is None else int(mask.sum())
        stored += sum(storage_bits(binarize, linear.out_features, linear.in_features, n_salient).values())
    return _report(chosen, {name: linears[name] for name in rules}, rules, stored)


def chosen_linears(model: nn.Module, binarize: BinarizeConfig, *, values_needed: bool = True) -> dict[str, FullLinear]:
    """The layers that `binarize_` would swap, by qualified name, refused as there but for their masks."""
    linears, fused = _linears(model), fused_modules(model)
    check_skip(binarize.skip, [*linears, *fused])
    check_fused({name: part for name, part in fused.items() if skip_entry(name, binarize.skip) is None})
    chosen = {name: linear for name, linear in linears.items() if skip_entry(name, binarize.skip) is None}
    check_linears(model, chosen, binarize, values_needed=values_needed)
    return chosen


def _set_rotary_frequencies(lm: LlamaForCausalLM, model: ModelConfig) -> None:
    """theta^(-2i / head size) in fp32: zero.Init rounds new float tensors to bf16, which rotations do not survive."""
    head_size = model.d_model // model.n_heads
    exponents = torch.arange(0, head_size, 2).to(torch.float32) / head_size  # born as integers, zero.Init lets them be
    rotary = lm.model.rotary_emb
    rotary.inv_freq = (1.0 / model.rope_theta**exponents).to(rotary.inv_freq.device)
    rotary.original_inv_freq = rotary.inv_freq.clone()


def _linears(model: nn.Module) -> dict[str, FullLinear]:
    return {name: linear for name, module in model.named_modules() if (linear := FullLinear.of(module)) is not None}


def _report(
    chosen: Mapping[str, FullLinear], kept: Mapping[str, FullLinear], rules: Mapping[str, str], stored_bits: int = 0
) -> BinarizeReport:
    return BinarizeReport(tuple(chosen), rules, _n_weights(chosen), _n_weights(kept), stored_bits)


def _n_weights(linears: Mapping[str, FullLinear]) -> int:
    return sum(linear.out_features * linear.in_features for linear in linears.values())


def _abbreviate(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
