"""From a config to a binary Llama: Hugging Face's LlamaForCausalLM with its Linears swapped by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fbitrain.errors import UserError
from fbitrain.kernels.layout import scale_shape
from fbitrain.model.config import BinarizeConfig, ModelConfig
from fbitrain.model.linear import BinaryLinear, PackedBinaryLinear
from fbitrain.model.size import skip_entry


@dataclass(frozen=True)
class BinarizeReport:
    """What became binary; str() is one line for the log."""

    binarized: tuple[str, ...]  # qualified names of the swapped Linears
    kept: Mapping[str, str]  # name of each other Linear -> the rule that kept it
    n_binary_weights: int
    n_kept_weights: int

    def __str__(self) -> str:
        n_linears = len(self.binarized) + len(self.kept)
        weights = _abbreviate(self.n_binary_weights)
        line = f"binarized {len(self.binarized)}/{n_linears} Linear layers ({weights} weights)"
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
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        report = binarize_(lm, binarize, init_std=model.init_std)
    _set_rotary_frequencies(lm, model)
    return lm, report


def binarize_(model: nn.Module, binarize: BinarizeConfig, *, init_std: float = 0.0) -> BinarizeReport:
    """Swaps the Linears of `model` for BinaryLinears in place, but for those that `binarize.skip` names.

    A layer keeps its weight's values, dtype and device, and its α and β start from them. Weights that are not here (on
    the meta device, or partitioned by ZeRO-3) are drawn anew with standard deviation `init_std`; 0 refuses them.
    Nothing has been swapped when this raises.

    Raises:
        UserError: a skip name matches nothing; a Linear has a bias, shares its weight with an embedding, is not a
            multiple of the group size wide, or has no values and `init_std` is 0.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if not binarize.enabled:
        return _report({}, linears, dict.fromkeys(linears, "binarize.enabled=false"))
    _check_skip(binarize.skip, list(linears))
    rules = {name: f"skip=[{entry}]" for name in linears if (entry := skip_entry(name, binarize.skip)) is not None}
    chosen = {name: linear for name, linear in linears.items() if name not in rules}
    _check_linears(model, chosen, binarize, values_needed=init_std == 0)
    report = _report(chosen, {name: linears[name] for name in rules}, rules)
    for name, linear in chosen.items():
        model.set_submodule(name, _binary(linear, binarize, init_std))
    return report


def pack_(model: nn.Module) -> None:
    """Swaps every BinaryLinear of `model` for its PackedBinaryLinear in place: one bit per weight, inference only."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BinaryLinear):
            model.set_submodule(name, PackedBinaryLinear.from_linear(module))


def _set_rotary_frequencies(lm: LlamaForCausalLM, model: ModelConfig) -> None:
    """theta^(-2i / head size) in fp32: zero.Init rounds new float tensors to bf16, which rotations do not survive."""
    head_size = model.d_model // model.n_heads
    exponents = torch.arange(0, head_size, 2).to(torch.float32) / head_size  # born as integers, zero.Init lets them be
    rotary = lm.model.rotary_emb
    rotary.inv_freq = (1.0 / model.rope_theta**exponents).to(rotary.inv_freq.device)
    rotary.original_inv_freq = rotary.inv_freq.clone()


def _binary(linear: nn.Linear, binarize: BinarizeConfig, init_std: float) -> BinaryLinear:
    layer = BinaryLinear(
        linear.in_features,
        linear.out_features,
        scale=binarize.scale,
        beta=binarize.beta,
        group_size=binarize.group_size,
        ste=binarize.ste,
        weight=linear.weight if _has_values(linear) else None,
        init_std=init_std,
        device=None if linear.weight.is_meta else linear.weight.device,
        dtype=linear.weight.dtype,
    )
    layer.train(linear.training)
    return layer


def _has_values(linear: nn.Linear) -> bool:
    # ZeRO-3 leaves an empty tensor in the place of a partitioned weight.
    return not linear.weight.is_meta and linear.weight.shape == (linear.out_features, linear.in_features)


def _check_skip(skip: list[str], names: list[str]) -> None:
    known = list(dict.fromkeys([*names, *(name.rpartition(".")[2] for name in names)]))
    for entry in skip:
        if entry not in known:
            near = difflib.get_close_matches(entry, known, n=3) or known[-3:]
            raise UserError(f"binarize.skip has {entry!r}, but no Linear is called that; near names: {', '.join(near)}")


def _check_linears(
    model: nn.Module, linears: Mapping[str, nn.Linear], binarize: BinarizeConfig, *, values_needed: bool
) -> None:
    embeddings = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name, linear in linears.items():
        if "bias" in dict(linear.named_parameters(recurse=False)):
            raise UserError(f"{name} has a bias, which binary layers have not; add it to binarize.skip")
        for other, embedding in embeddings.items():
            if linear.weight is embedding.weight:
                raise UserError(f"{name} shares its weight with the embedding {other}; add it to binarize.skip")
        if values_needed and not _has_values(linear):
            raise UserError(f"the weight of {name} is not loaded (meta device, or partitioned); binarize a whole model")
        try:
            scale_shape(binarize.scale, linear.out_features, linear.in_features, binarize.group_size)
        except ValueError as error:
            raise UserError(
                f"{name} cannot be binarized: {error}; change binarize.scale or binarize.group_size"
            ) from None


def _report(chosen: Mapping[str, nn.Linear], kept: Mapping[str, nn.Linear], rules: Mapping[str, str]) -> BinarizeReport:
    return BinarizeReport(tuple(chosen), rules, _n_weights(chosen), _n_weights(kept))


def _n_weights(linears: Mapping[str, nn.Linear]) -> int:
    return sum(linear.out_features * linear.in_features for linear in linears.values())


def _abbreviate(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
