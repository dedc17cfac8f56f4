"""Parameter groups by kind, their rates, and the size of an update beside what really changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from fbitrain.base.errors import UserError
from fbitrain.config import Config, DistillConfig, TrainConfig
from fbitrain.config_optim import (
    KINDS,
    FusedMatrix,
    KindFactors,
    MuonConfig,
    OptimConfig,
    describe_optimizer,
)
from fbitrain.model.build import binarize_
from fbitrain.model.config import BinarizeConfig, ModelConfig
from fbitrain.model.size import frozen_parameters
from fbitrain.optim.muon import MatrixForm
from fbitrain.optim.optimizer import (
    build_optimizer,
    ensure_state,
    matrix_forms,
    param_groups,
    set_rates,
    update_squares,
)
from fbitrain.parameters import freeze_, parameter_kinds
from fbitrain.student import Student

CPU = torch.device("cpu")
TRAIN = TrainConfig(total_steps=10)


def student(binarize: BinarizeConfig | None = None, *, tied: bool = False) -> Student:
    sizes: dict[str, Any] = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    lm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attention_bias=True, tie_word_embeddings=tied))
    binarize_(lm, binarize or BinarizeConfig())
    return Student(lm, DistillConfig())


def config(**optim: Any) -> Config:
    return Config(optim=OptimConfig(warmup_steps=0, **optim), train=TRAIN)


@pytest.mark.parametrize("tied", [False, True])
def test_frozen_kinds_are_in_no_group(tied: bool) -> None:
    """What BinaryMoS trains: the binary layers alone, their biases, scales and routers with them."""
    model = student(BinarizeConfig(method="mixture_of_scales"), tied=tied)
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    binary = sum(count for name, count in counts.items() if "_proj." in name)
    line = freeze_(model, ["embeddings", "norms", "head"])
    assert line.startswith(f"training {binary:,} of {sum(counts.values()):,} parameters; frozen: {11 * 12} embeddings")
    groups = param_groups(config(), model)
    assert {group["kind"] for group in groups} == {"matrices", "scales", "routers", "biases"}
    assert sum(parameter.numel() for group in groups for parameter in group["params"]) == binary
    sizes = ModelConfig(vocab_size=11, n_layers=1, d_model=12, d_ff=20, n_heads=2, tie_embeddings=tied)
    assert frozen_parameters(sizes, ["embeddings", "norms", "head"]) == sum(counts.values()) - binary


def test_every_kind_has_a_group_of_its_own() -> None:
    model = student(BinarizeConfig(method="mixture_of_scales"))
    groups = param_groups(config(), model)
    assert {group["kind"] for group in groups} == set(KINDS) - {"others"}
    n_parameters = sum(len(group["params"]) for group in groups)
    assert n_parameters == len(list(model.parameters()))
    (head,) = next(group["params"] for group in groups if group["kind"] == "head")
    assert head is model.head.weight
    (matrices,) = (group["params"] for group in groups if group["kind"] == "matrices")
    assert len(matrices) == 7


def test_a_tied_head_is_of_the_embeddings() -> None:
    model = student(tied=True)
    assert set(parameter_kinds(model).values()) == {"matrices", "scales", "embeddings", "norms", "biases"}


def test_frozen_parameters_are_in_no_group() -> None:
    model = student()
    model.lm.get_input_embeddings().weight.requires_grad_(False)
    assert "embeddings" not in {group["kind"] for group in param_groups(config(), model)}


def test_rates_and_decays_go_by_kind() -> None:
    factors = KindFactors(**{kind: (i + 1) / 8 for i, kind in enumerate(KINDS)})
    decays = KindFactors(**{kind: i / 4 for i, kind in enumerate(KINDS)})
    settings = config(lr=2e-3, min_lr=2e-4, weight_decay=0.1, lr_factor=factors, decay_factor=decays)
    groups = param_groups(settings, student(BinarizeConfig(method="mixture_of_scales")))
    set_rates(groups, settings, 10)
    for group in groups:
        i = KINDS.index(group["kind"])
        assert group["lr"] == pytest.approx(2e-4 * (i + 1) / 8)
        assert group["weight_decay"] == pytest.approx(0.1 * i / 4)


def test_muon_has_the_matrices_at_its_own_rate_on_the_same_schedule() -> None:
    settings = config(optimizer="muon", lr=2e-3, min_lr=2e-4, muon=MuonConfig(lr=0.04, weight_decay=0.3))
    groups = param_groups(settings, student())
    assert {group["kind"] for group in groups if group["muon"]} == {"matrices"}
    for step, share in ((1, None), (10, 0.1)):
        set_rates(groups, settings, step)
        rates = {group["kind"]: group["lr"] for group in groups}
        assert rates["matrices"] / rates["norms"] == pytest.approx(20)
        assert share is None or rates["matrices"] == pytest.approx(0.04 * share)
    assert next(group for group in groups if group["muon"])["weight_decay"] == 0.3


def test_an_optimizer_in_one_line() -> None:
    assert describe_optimizer(OptimConfig()) == "AdamW, weight decay 0.1"
    ours = OptimConfig(optimizer="muon", weight_decay=0, lr_factor=KindFactors(scales=0.1))
    assert describe_optimizer(ours) == (
        "Muon 0.02 for the matrices, AdamW for the rest, scales at 0.1 of its rate, weight decay 0"
    )


def test_the_second_of_two_stages_has_no_weight_decay() -> None:
    two = config(schedule="two_stage", lr=1e-3, min_lr=0, stage2_step=6, stage2_lr=1e-4, weight_decay=0.1)
    groups = param_groups(two, student())
    head = next(group for group in groups if group["kind"] == "head")
    set_rates(groups, two, 5)
    assert head["weight_decay"] == pytest.approx(0.1)
    set_rates(groups, two, 6)
    assert head["weight_decay"] == 0


@pytest.mark.parametrize("step", [1, 2, 7])
def test_the_size_of_adams_update_is_what_changed(step: int) -> None:
    """Recomputed from the moments after the step, beside the difference of the weights in float64."""
    model = student()
    settings = config(lr=3e-3, weight_decay=0.0)
    optimizer = build_optimizer(settings, model, torch.float32, CPU)
    for i in range(step):
        set_rates(optimizer.param_groups, settings, i + 1)
        before = [p.detach().double().clone() for p in model.parameters()]
        for j, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + j))
        optimizer.step()
    changed = sum(
        (p.detach().double() - b).square().sum().item() for p, b in zip(model.parameters(), before, strict=True)
    )
    found = sum(
        update_squares(group, ensure_state(optimizer, group, p), p).item()
        for group in optimizer.param_groups
        for p in group["params"]
    )
    assert found == pytest.approx(changed, rel=1e-3)


def test_fused_rows_are_of_linears_that_are_there() -> None:
    model = student()
    muon = MuonConfig(fused=[FusedMatrix("gate_proj", [8, 12]), FusedMatrix("model.layers.0.mlp.up_proj", [10, 10])])
    forms = matrix_forms(config(optimizer="muon", muon=muon), model)
    parameters = dict(model.lm.named_parameters())
    assert len(forms) == 7
    assert forms[id(parameters["model.layers.0.mlp.gate_proj.weight"])] == MatrixForm(rows=(8, 12))
    assert forms[id(parameters["model.layers.0.mlp.up_proj.weight"])] == MatrixForm(rows=(10, 10))
    assert forms[id(parameters["model.layers.0.mlp.down_proj.weight"])] == MatrixForm()
    wrong = replace(muon, fused=[FusedMatrix("gate", [8, 12]), FusedMatrix("embed_tokens", [5, 6])])
    with pytest.raises(UserError) as raised:
        matrix_forms(config(optimizer="muon", muon=wrong), model)
    assert "'gate', and no Linear is called so; " in str(raised.value)
    assert "'embed_tokens', and no Linear is called so" in str(raised.value)


def test_gpt2s_matrices_are_transposed_until_they_become_binary() -> None:
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    binarize_(lm, BinarizeConfig(skip=["lm_head", "c_attn"]))
    muon = MuonConfig(fused=[FusedMatrix("c_attn", [8, 8, 8])])
    forms = matrix_forms(config(optimizer="muon", muon=muon), model := Student(lm, DistillConfig()))
    found = {name: forms[id(p)] for name, p in model.lm.named_parameters() if id(p) in forms}
    assert found["transformer.h.0.attn.c_attn.weight"] == MatrixForm((8, 8, 8), transposed=True)
    assert found["transformer.h.0.mlp.c_fc.weight"] == MatrixForm()


def test_what_is_no_linears_matrix_is_adamws_under_a_kind_of_its_own() -> None:
    sizes = {"vocab_size": 11, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2}
    model = Student(MambaForCausalLM(MambaConfig(**sizes)), DistillConfig())
    groups = {group["kind"]: group for group in param_groups(config(optimizer="muon"), model)}
    assert groups["matrices"]["muon"]
    assert not groups["others"]["muon"]
    names = {id(p): name for name, p in model.named_parameters()}
    assert any(names[id(p)].endswith("A_log") for p in groups["others"]["params"])
    assert all(names[id(p)].endswith("proj.weight") for p in groups["matrices"]["params"])
