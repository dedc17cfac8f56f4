"""The training objective around any causal language model: the head's loss, and the distance of hidden states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from fbitrain.base.errors import UserError
from fbitrain.config import DistillConfig
from fbitrain.model.build import binarize_
from fbitrain.model.config import BinarizeConfig
from fbitrain.parameters import parameter_kinds
from fbitrain.student import Student
from fbitrain.teacher import Teacher

V, T = 50, 12


def llama(*, tied: bool = True) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=3,
            num_attention_heads=2,
            tie_word_embeddings=tied,
            initializer_range=0.3,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=24, n_layer=2, n_head=2, n_positions=16))


def neox() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=V, num_attention_heads=2, **sizes))


def opt() -> PreTrainedModel:
    sizes: dict[str, Any] = {"hidden_size": 24, "ffn_dim": 20, "num_hidden_layers": 2, "word_embed_proj_dim": 24}
    return OPTForCausalLM(OPTConfig(vocab_size=V, num_attention_heads=2, max_position_embeddings=16, **sizes))


def batch(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (n, T + 1), generator=torch.Generator().manual_seed(seed))


def teacher_of(model: PreTrainedModel) -> Teacher:
    return Teacher(model.config, model.get_output_embeddings().weight.detach(), 0, model.base_model)


@pytest.mark.parametrize("make", [llama, gpt2, neox, opt])
def test_any_causal_model_is_a_student(make: Any) -> None:
    torch.manual_seed(0)
    lm = make().eval()
    ids = batch(2)
    with torch.no_grad():
        logits = lm(ids[:, :-1]).logits
    wanted = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    student = Student(lm, DistillConfig(kd_weight=0.0, ce_weight=1.0, chunk_tokens=7))
    loss, metrics = student(ids)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert metrics.tokens == 2 * T
    loss.backward()
    assert all(p.grad is not None for name, p in student.named_parameters() if "embed_positions" not in name)
    if lm.config.tie_word_embeddings:
        assert student.head.weight is lm.get_input_embeddings().weight
    torch.testing.assert_close(student(ids[:, :-1], last_logits=True), logits[:, -1], rtol=1e-4, atol=1e-5)


def test_a_binary_head_is_refused() -> None:
    """Its latent matrix would be trained as it is, and its scales be lost."""
    lm = llama(tied=False)
    binarize_(lm, BinarizeConfig(skip=[]))
    with pytest.raises(UserError, match=r"^lm_head is the output head, .*; add 'lm_head' to binarize.skip$"):
        Student(lm, DistillConfig())


def test_kinds_go_by_the_module_that_owns_a_parameter() -> None:
    kinds = parameter_kinds(Student(gpt2(), DistillConfig()))
    found = {name.removeprefix("lm.transformer."): kind for name, kind in kinds.items()}
    assert found["wte.weight"] == found["wpe.weight"] == "embeddings"
    assert found["h.0.ln_1.weight"] == found["ln_f.bias"] == "norms"
    assert found["h.1.mlp.c_fc.weight"] == "matrices"
    assert found["h.1.mlp.c_fc.bias"] == "biases"
    assert parameter_kinds(Student(llama(tied=False), DistillConfig()))["lm.lm_head.weight"] == "head"


@pytest.mark.parametrize("kd_weight", [0.0, 0.7])
def test_the_hidden_states_distance_is_the_sum_over_layers_of_mean_squares(kd_weight: float) -> None:
    torch.manual_seed(1)
    mine, theirs = llama(), llama().eval().requires_grad_(False)
    distill = DistillConfig(kd_weight=kd_weight, ce_weight=0.3, hidden_weight=10.0)
    ids = batch(3)
    targets = teacher_of(theirs).targets(ids[:, :-1], with_states=True)
    student = Student(mine, distill)
    loss, metrics = student(ids, *targets)
    without, _ = student(ids, *targets[:2])
    states = [m.base_model(ids[:, :-1], output_hidden_states=True).hidden_states for m in (mine, theirs)]
    naive = 0.0
    for layer in range(1, 4):
        squares = [
            (float(a) - float(b)) ** 2 for a, b in zip(*(s[layer].detach().flatten() for s in states), strict=True)
        ]
        naive += sum(squares) / len(squares)
    assert (loss - without).item() == pytest.approx(10 * naive, rel=1e-4)
    assert float(metrics.hidden_mse) == pytest.approx(naive * 3 * T, rel=1e-4)
    loss.backward()
    gradient = mine.model.layers[0].mlp.up_proj.weight.grad.clone()
    mine.zero_grad()
    student(ids, *targets[:2])[0].backward()
    assert not torch.allclose(gradient, mine.model.layers[0].mlp.up_proj.weight.grad)


@pytest.mark.parametrize("kd_weight", [1.0, 0.7])
def test_per_sequence_the_balance_is_the_published_one(kd_weight: float) -> None:
    """BinaryMoS (arXiv 2406.12311): KL(teacher ‖ student) summed over a sequence, a mean over the batch's sequences
    ("batchmean"), + 10 · Σ over layers of the mean square. The gradients are ours times T.
    """
    torch.manual_seed(3)
    mine, theirs = llama().double(), llama().double().eval().requires_grad_(False)
    ids, weights = batch(3), [p for p in mine.parameters() if p.requires_grad]
    outputs = [m(ids[:, :-1], output_hidden_states=True) for m in (mine, theirs)]
    logs, teachers = (output.logits.log_softmax(-1) for output in outputs)
    kd = (teachers.exp() * (teachers - logs)).sum() / 3
    pairs = zip(*(output.hidden_states[1:] for output in outputs), strict=True)
    published = torch.autograd.grad(kd_weight * kd + 10 * sum((a - b).square().mean() for a, b in pairs), weights)
    distill = DistillConfig(kd_weight=kd_weight, hidden_weight=10.0, hidden_per="sequence", chunk_tokens=7)
    loss, _ = Student(mine, distill)(ids, *teacher_of(theirs).targets(ids[:, :-1], with_states=True))
    for found, wanted in zip(torch.autograd.grad(loss, weights), published, strict=True):
        torch.testing.assert_close(found * T, wanted, rtol=1e-4, atol=1e-6)


def test_the_loss_does_not_depend_on_how_sequences_are_batched() -> None:
    torch.manual_seed(2)
    student, teacher = Student(llama(), DistillConfig(ce_weight=0.5, hidden_weight=10.0)), teacher_of(llama().eval())

    def loss_of(ids: Tensor) -> Tensor:
        loss: Tensor = student(ids, *teacher.targets(ids[:, :-1], with_states=True))[0]
        return loss.detach()

    ids = batch(4)
    alone = torch.stack([loss_of(ids[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(loss_of(ids), alone.mean(), rtol=1e-5, atol=1e-6)
    twice = torch.cat([ids, ids])
    torch.testing.assert_close(loss_of(twice), loss_of(ids), rtol=1e-5, atol=1e-6)
