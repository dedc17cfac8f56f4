"""Building, binarizing and packing whole models, and counting their parameters without building them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from fbitrain.base.errors import UserError
from fbitrain.model.binarize import init_scales
from fbitrain.model.build import binarize_, build_student, llama_config
from fbitrain.model.config import PRESETS, BinarizeConfig, ModelConfig
from fbitrain.model.latent import LatentLinear
from fbitrain.model.linear import BinaryLinear
from fbitrain.model.method_table import METHODS
from fbitrain.model.packed_layers import PackedBinaryLinear
from fbitrain.model.size import ParameterCount, count_parameters
from fbitrain.model.storage import storage_bits
from tests.model.packing import pack_

SMALL = ModelConfig(vocab_size=67, n_layers=2, n_heads=4, n_kv_heads=2, d_model=24, d_ff=40, max_seq_len=32)
KEEP_HEAD = BinarizeConfig()
FULL_PRECISION = BinarizeConfig(enabled=False)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_llama_config_has_every_size() -> None:
    shape = ModelConfig(vocab_size=99, n_layers=3, n_heads=4, d_model=32, d_ff=48, max_seq_len=77)
    config = llama_config(replace(shape, rope_theta=5e4, norm_eps=1e-4))
    assert (config.vocab_size, config.num_hidden_layers, config.num_attention_heads) == (99, 3, 4)
    assert (config.num_key_value_heads, config.hidden_size, config.intermediate_size) == (4, 32, 48)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.head_dim) == (77, 1e-4, 8)
    assert config.rope_parameters["rope_theta"] == 5e4
    assert not config.tie_word_embeddings


def test_build_student() -> None:
    lm, report = build_student(SMALL, KEEP_HEAD, seed=3)
    assert isinstance(lm, LlamaForCausalLM)
    assert lm.config._attn_implementation == "sdpa"
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.float32}
    assert lm.model.rotary_emb.inv_freq.dtype == torch.float32
    assert isinstance(lm.lm_head, nn.Linear)
    assert isinstance(lm.get_submodule("model.layers.1.self_attn.k_proj"), BinaryLinear)
    assert len(report.binarized) == 14
    assert report.kept == {"lm_head": "skip=[lm_head]"}
    assert report.n_kept_weights == 67 * 24
    loss = lm(input_ids=tokens(2, 9), labels=tokens(2, 9)).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in lm.parameters())


def test_report_is_one_line() -> None:
    twelve_layers = ModelConfig(vocab_size=50, n_layers=12, n_heads=2, d_model=16, d_ff=32)
    _, report = build_student(twelve_layers, KEEP_HEAD, seed=0)
    assert str(report) == (
        "binarized 84/85 Linear layers (30.7k weights, 5.000 bits each); kept lm_head (rule: skip=[lm_head])"
    )
    _, report = build_student(SMALL, BinarizeConfig(skip=["v_proj", "lm_head"]), seed=0)
    assert str(report) == (
        "binarized 12/15 Linear layers (8.6k weights, 3.763 bits each); kept model.layers.0.self_attn.v_proj, "
        "model.layers.1.self_attn.v_proj (rule: skip=[v_proj]); kept lm_head (rule: skip=[lm_head])"
    )
    _, report = build_student(SMALL, FULL_PRECISION, seed=0)
    assert str(report) == (
        "binarized 0/15 Linear layers (0 weights); kept model.layers.0.self_attn.q_proj, "
        "model.layers.0.self_attn.k_proj and 13 more (rule: binarize.enabled=false)"
    )


def test_rotary_frequencies_stay_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where float tensors are born in bf16, as inside DeepSpeed's zero.Init."""
    wanted = LlamaForCausalLM(llama_config(SMALL)).model.rotary_emb.inv_freq
    arange = torch.arange

    def rounding_arange(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = arange(*args, **kwargs)
        return made.bfloat16() if made.is_floating_point() else made

    assert torch.equal(build_student(SMALL, KEEP_HEAD, seed=0)[0].model.rotary_emb.inv_freq, wanted)
    monkeypatch.setattr(torch, "arange", rounding_arange)
    rotary = build_student(SMALL, KEEP_HEAD, seed=0)[0].model.rotary_emb
    assert (rotary.inv_freq.dtype, rotary.original_inv_freq.dtype) == (torch.float32, torch.float32)
    assert torch.equal(rotary.inv_freq, wanted)


def test_seed_decides_the_weights_and_nothing_else_changes() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    lm, _ = build_student(SMALL, KEEP_HEAD, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert same_weights(lm, build_student(SMALL, KEEP_HEAD, seed=3)[0])
    assert not same_weights(lm, build_student(SMALL, KEEP_HEAD, seed=4)[0])


@pytest.mark.parametrize(("scale", "beta"), [("column", True), ("row", False), ("group", False)])
def test_binarize_keeps_weights_and_starts_scales_from_them(scale: str, beta: bool) -> None:
    lm, _ = build_student(SMALL, FULL_PRECISION, seed=1)
    binary, _ = build_student(SMALL, BinarizeConfig(scale=scale, beta=beta, group_size=8), seed=1)
    binarize = BinarizeConfig(scale=scale, beta=beta, group_size=8)
    weights = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    binarize_(lm, binarize)
    for name, tensor in weights.items():
        assert torch.equal(lm.state_dict()[name], tensor), name
    layer = lm.get_submodule("model.layers.0.mlp.down_proj")
    alpha, shift = init_scales(layer.weight, scale, beta, 8)
    assert torch.equal(layer.alpha, alpha)
    assert shift is None or torch.equal(layer.beta, shift)
    assert same_weights(lm, binary)


def test_binarize_keeps_dtype_and_mode() -> None:
    lm = build_student(SMALL, FULL_PRECISION, seed=1)[0].bfloat16().eval()
    binarize_(lm, KEEP_HEAD)
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in lm.modules())


def test_skip_by_full_name() -> None:
    _, report = build_student(SMALL, BinarizeConfig(skip=["lm_head", "model.layers.1.mlp.up_proj"]), seed=0)
    assert report.kept == {
        "model.layers.1.mlp.up_proj": "skip=[model.layers.1.mlp.up_proj]",
        "lm_head": "skip=[lm_head]",
    }


def tied(lm: LlamaForCausalLM) -> None:
    lm.lm_head.weight = lm.model.embed_tokens.weight


def on_meta(lm: LlamaForCausalLM) -> None:
    lm.model.layers[0].to("meta")


def unchanged(lm: LlamaForCausalLM) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "binarize", "message"),
    [
        (unchanged, BinarizeConfig(skip=["lm_hed"]), "binarize.skip has 'lm_hed', but .* near names: lm_head"),
        (unchanged, BinarizeConfig(skip=["proj"]), "near names: .*_proj"),
        (tied, BinarizeConfig(skip=[]), "lm_head shares its weight with the embedding model.embed_tokens; add it"),
        (unchanged, BinarizeConfig(scale="group", beta=False, group_size=16), "in_features=24 is not a multiple"),
        (on_meta, KEEP_HEAD, r"weight of model\.layers\.0\.self_attn\.q_proj is not loaded"),
    ],
)
def test_refusals_change_nothing(
    change: Callable[[LlamaForCausalLM], None], binarize: BinarizeConfig, message: str
) -> None:
    lm, _ = build_student(SMALL, FULL_PRECISION, seed=1)
    change(lm)
    with pytest.raises(UserError, match=message):
        binarize_(lm, binarize)
    assert not any(isinstance(module, BinaryLinear) for module in lm.modules())


def test_partitioned_weights_are_drawn_anew() -> None:
    """ZeRO-3 leaves empty tensors behind; a student from scratch needs none of the old values."""
    lm, _ = build_student(SMALL, FULL_PRECISION, seed=1)
    for layer in lm.model.layers.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = torch.empty(0)
    torch.manual_seed(2)
    binarize_(lm, KEEP_HEAD, init_std=0.5)
    weight = lm.get_submodule("model.layers.0.mlp.down_proj").weight
    assert weight.shape == (24, 40)
    assert weight.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize(("scale", "beta"), [("column", True), ("tensor", True), ("group", False)])
def test_packed_model_gives_the_same_logits(scale: str, beta: bool) -> None:
    lm, report = build_student(SMALL, BinarizeConfig(scale=scale, beta=beta, group_size=8), seed=5)
    lm.eval()
    with torch.no_grad():
        wanted = lm(input_ids=tokens(2, 11)).logits
        pack_(lm)
        torch.testing.assert_close(lm(input_ids=tokens(2, 11)).logits, wanted)
    for name in report.binarized:
        assert isinstance(lm.get_submodule(name), PackedBinaryLinear)


def count_built(lm: LlamaForCausalLM, binarize: BinarizeConfig) -> ParameterCount:
    by_kind = dict.fromkeys(("binary", "scales", "embeddings", "dense", "norms", "routers", "stored_bits"), 0)
    for module in lm.modules():
        if isinstance(module, LatentLinear):
            by_kind["stored_bits"] += sum(storage_bits(binarize, module.out_features, module.in_features).values())
    for name, parameter in lm.named_parameters():
        owner = lm.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, LatentLinear):
            kind = {"weight": "binary", "router": "routers"}.get(name.rpartition(".")[2], "scales")
        elif isinstance(owner, nn.Embedding) or owner is lm.lm_head:
            kind = "embeddings"
        else:
            kind = "dense" if isinstance(owner, nn.Linear) else "norms"
        by_kind[kind] += parameter.numel()
    return ParameterCount(**by_kind)


@pytest.mark.parametrize(
    "model",
    [
        SMALL,
        ModelConfig(vocab_size=131, n_layers=3, n_heads=2, d_model=16, d_ff=56),
        ModelConfig(vocab_size=40, n_layers=1, n_heads=6, n_kv_heads=1, d_model=48, d_ff=8, tie_embeddings=True),
    ],
)
@pytest.mark.parametrize(
    "binarize",
    [
        KEEP_HEAD,
        FULL_PRECISION,
        BinarizeConfig(scale="row", beta=False),
        BinarizeConfig(scale="tensor", skip=["lm_head", "down_proj"]),
        BinarizeConfig(scale="group", beta=False, group_size=4, skip=["lm_head", "model.layers.0.self_attn.k_proj"]),
        *(BinarizeConfig(method=method, n_experts=3) for method, traits in METHODS.items() if not traits.salient),
    ],
)
def test_count_parameters_equals_the_built_model(model: ModelConfig, binarize: BinarizeConfig) -> None:
    assert count_parameters(model, binarize) == count_built(build_student(model, binarize, seed=0)[0], binarize)


def test_count_parameters_with_a_binary_head() -> None:
    binarize = BinarizeConfig(skip=[])
    assert count_parameters(SMALL, binarize) == count_built(build_student(SMALL, binarize, seed=0)[0], binarize)


def test_presets_have_the_papers_sizes() -> None:
    """The 7b preset is LLaMA-7B, whose size is known to the unit; the smaller two are named after theirs."""
    counts = {name: count_parameters(ModelConfig(**PRESETS[name]), KEEP_HEAD) for name in PRESETS}
    assert counts["7b"].total - counts["7b"].scales == 6_738_415_616
    assert counts["1.3b"].total == pytest.approx(1.3e9, rel=0.06)
    assert counts["130m"].total == pytest.approx(130e6, rel=0.04)
    assert counts["130m"].binary == 84_934_656


def test_bits_per_weight() -> None:
    model = ModelConfig(**PRESETS["130m"])
    group = BinarizeConfig(scale="group", beta=False, group_size=128)
    assert count_parameters(model, group).bits_per_weight == 1 + 32 / 128
    assert count_parameters(model, FULL_PRECISION).bits_per_weight == 32
