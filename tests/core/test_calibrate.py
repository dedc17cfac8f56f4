"""Calibration of five architectures against hooks on whole forward passes, and files of masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from fbitrain.base.errors import UserError
from fbitrain.calibration import calibrate
from fbitrain.calibration.block_walk import BlockWalk, weight_NK
from fbitrain.calibration.calibrate import fisher_diagonals, quantize_, select_masks
from fbitrain.calibration.text import cut_sequences, read_calibration
from fbitrain.config import CalibrationConfig
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.model.build import binarize_, chosen_linears
from fbitrain.model.config import CRITERIA, HESSIAN_SCORES, BinarizeConfig, SalientConfig
from fbitrain.model.gptq_pb import gptq_partial
from fbitrain.model.partial import PartialBinaryLinear
from fbitrain.model.salience import hessian_scores, select_mask
from tests.conftest import Workspace

VOCAB = 53
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
    ),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=0.3),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.3,
    ),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=24, init_std=0.3, pad_token_id=1,
    ),
    # Its blocks get masks and position embeddings of their own: a window, or the whole sequence.
    "gemma3": Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=32, initializer_range=0.3, sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}  # fmt: skip
ARCHITECTURES = pytest.mark.parametrize("architecture", CONFIGS)


def build(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    lm: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[architecture], attn_implementation="sdpa")
    return lm.eval()


def setting(**salient: Any) -> BinarizeConfig:
    return BinarizeConfig(
        method="partial",
        scale="row",
        beta=False,
        salient=SalientConfig(fraction=0.2, **salient),
    )


def sequences(n: int = 5, seq_len: int = 16) -> Tensor:
    return torch.randint(2, VOCAB, (n, seq_len), generator=torch.Generator().manual_seed(1))


def linears_of(lm: PreTrainedModel, binarize: BinarizeConfig) -> dict[str, nn.Module]:
    return {name: linear.module for name, linear in chosen_linears(lm, binarize).items()}


def hessians_by_hooks(lm: PreTrainedModel, linears: Mapping[str, nn.Module], ids: Tensor) -> dict[str, Tensor]:
    """Mean of x xᵀ for every Linear, from whole forward passes over all sequences at once."""
    inputs: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: inputs.__setitem__(name, args[0].flatten(0, -2).double())

    hooks = [linear.register_forward_pre_hook(recorder(name)) for name, linear in linears.items()]
    with torch.no_grad():
        lm(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return {name: x.T @ x / len(x) for name, x in inputs.items()}


@ARCHITECTURES
@pytest.mark.parametrize("score", HESSIAN_SCORES)
def test_masks_by_hessian_are_those_of_whole_forward_passes(architecture: str, score: str) -> None:
    lm, binarize, ids = build(architecture), setting(criterion=score), sequences()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    masks = select_masks(lm, binarize, ids)
    linears = linears_of(lm, binarize)
    assert list(masks) == list(linears)
    for name, hessian in hessians_by_hooks(lm, linears, ids).items():
        expected = select_mask(hessian_scores(weight_NK(linears[name]), hessian, 0.01, score), 0.2)
        assert masks[name].shape == weight_NK(linears[name]).shape
        assert (masks[name] == expected).float().mean() > 0.995, name  # fp32 against fp64 may order two scores anew
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())


@ARCHITECTURES
def test_fisher_diagonals_are_squared_gradients_of_each_sequence(architecture: str) -> None:
    lm, binarize, ids = build(architecture), setting(), sequences(3)
    linears = linears_of(lm, binarize)
    found = dict(fisher_diagonals(lm, linears, ids))
    in_portions = dict(fisher_diagonals(lm, linears, ids, max_bytes=1))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in lm.parameters())
    expected = {name: torch.zeros_like(weight_NK(linear)) for name, linear in linears.items()}
    for sequence in ids:
        lm.zero_grad()
        F.cross_entropy(lm(input_ids=sequence[None]).logits[0, :-1], sequence[1:]).backward()
        for name, linear in linears.items():
            gradient = linear.get_parameter("weight").grad
            assert gradient is not None
            expected[name] += (gradient.T if isinstance(linear, Conv1D) else gradient).square() / 3
    for name in linears:
        assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-9), name
        assert torch.allclose(in_portions[name], expected[name], rtol=1e-4, atol=1e-9), name


def test_criteria_choose_by_their_scores() -> None:
    lm, ids = build("llama"), sequences(3)
    linears = linears_of(lm, setting())
    by_magnitude = select_masks(lm, setting(criterion="magnitude"), None)
    by_fisher = select_masks(lm, setting(criterion="fisher"), ids)
    for name, fisher in fisher_diagonals(lm, linears, ids):
        for mask, scores in ((by_magnitude[name], weight_NK(linears[name]).abs()), (by_fisher[name], fisher)):
            assert int(mask.sum()) == round(0.2 * mask.numel())
            assert scores[mask].min() >= scores[~mask].max()


def test_hessian_takes_the_cholesky_score_only_where_gptq_solves_few_salient_weights() -> None:
    def solved(criterion: str, **how: bool) -> dict[str, Tensor]:
        binarize = setting(criterion=criterion)
        binarize = replace(binarize, salient=replace(binarize.salient, fraction=0.1))
        parts = quantize_(build("llama"), binarize, CalibrationConfig(**how), sequences())
        return {name: part.mask for name, part in parts.items()}

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(one[name], other[name]) for name in one)

    diagonal, cholesky = solved("hessian_diagonal"), solved("hessian_cholesky")
    assert not same(diagonal, cholesky)
    assert same(solved("hessian"), cholesky)
    assert same(solved("hessian", feedback=False), solved("hessian_diagonal", feedback=False))
    by_selection = [
        select_masks(build("llama"), setting(criterion=c), sequences()) for c in ("hessian", "hessian_diagonal")
    ]
    assert same(*by_selection)


@ARCHITECTURES
def test_each_block_is_solved_for_the_quantized_blocks_before_it(architecture: str) -> None:
    binarize, ids = setting(criterion="hessian"), sequences()
    original, lm = build(architecture), build(architecture)
    parts = quantize_(lm, binarize, CalibrationConfig(block_size=7), ids)
    originals, linears = linears_of(original, binarize), linears_of(lm, binarize)
    assert list(parts) == list(linears)
    # `original` becomes the quantized model, block by block, and gives the inputs that each block's solution is for.
    for block in range(original.config.num_hidden_layers):
        names = [name for name in parts if f".{block}." in name]
        assert len(names) >= 4
        hessians = hessians_by_hooks(original, {name: originals[name] for name in names}, ids)
        for name in names:
            expected = gptq_partial(weight_NK(originals[name]), hessians[name], parts[name].mask, block_size=7)
            same = (expected.effective_weight() - parts[name].effective_weight()).abs() < 1e-4
            assert same.float().mean() > 0.97, name  # the rest: weights so near 0 that fp32 decides their sign
            assert torch.equal(weight_NK(linears[name]), parts[name].weight)
        for name in names:
            weight_NK(originals[name]).copy_(parts[name].effective_weight())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("feedback", [True, False])
def test_the_binarized_model_computes_with_the_solved_weights(criterion: str, feedback: bool) -> None:
    binarize, ids, lm = setting(criterion=criterion), sequences(), build("llama")
    parts = quantize_(lm, binarize, CalibrationConfig(feedback=feedback), ids)
    assert {int(part.mask.sum()) - round(0.2 * part.mask.numel()) for part in parts.values()} == {0}
    dense = build("llama")
    for name, linear in linears_of(dense, binarize).items():
        weight_NK(linear).copy_(parts[name].effective_weight())
    binarize_(lm, binarize, masks={name: part.mask for name, part in parts.items()})
    for name, part in parts.items():
        layer = lm.get_submodule(name)
        assert isinstance(layer, PartialBinaryLinear)
        assert part.codes is not None
        assert part.scale is not None
        layer.load_salient(part.codes, part.scale)
    with torch.no_grad():
        assert torch.allclose(lm(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_feedback_brings_the_outputs_nearer_to_those_of_the_model() -> None:
    ids, original = sequences(20, 32), build("llama")
    errors = {}
    for feedback in (True, False):
        lm = build("llama")
        parts = quantize_(lm, setting(), CalibrationConfig(feedback=feedback), ids)
        for name, linear in linears_of(lm, setting()).items():
            weight_NK(linear).copy_(parts[name].effective_weight())
        with torch.no_grad():
            errors[feedback] = (lm(input_ids=ids).logits - original(input_ids=ids).logits).square().mean().item()
    assert errors[True] < errors[False]


def test_linears_with_one_input_share_one_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(calibrate.HessianSum):
        def __init__(self, k: int, **options: Any) -> None:
            made.append(k)
            super().__init__(k, **options)

    monkeypatch.setattr(calibrate, "HessianSum", Counted)
    select_masks(build("llama"), setting(criterion="hessian"), sequences(2))
    assert made == 3 * [24, 24, 24, 40]  # q k v, o, gate up, down


def test_the_result_is_deterministic() -> None:
    first, second = (
        quantize_(build("llama"), setting(criterion="fisher"), CalibrationConfig(), sequences()) for _ in range(2)
    )
    for name, part in first.items():
        assert torch.equal(part.mask, second[name].mask)
        assert torch.equal(part.weight, second[name].weight)


def test_groups_and_skipped_modules_are_respected() -> None:
    skip = ["lm_head", "down_proj", "model.layers.1.mlp.up_proj"]
    binarize = replace(setting(), scale="group", group_size=8, skip=skip)
    parts = quantize_(build("llama"), binarize, CalibrationConfig(), sequences())
    assert "model.layers.0.mlp.up_proj" in parts
    assert not any(name.endswith("down_proj") or name == "model.layers.1.mlp.up_proj" for name in parts)
    assert {part.alpha.shape[1] for part in parts.values()} == {24 // 8}


@pytest.mark.parametrize("criterion", ["hessian", "fisher"])
def test_a_linear_outside_the_blocks_is_refused(criterion: str) -> None:
    with pytest.raises(UserError, match=r"lm_head is outside the decoder blocks \(model.layers\).*binarize.skip"):
        select_masks(build("llama"), replace(setting(criterion=criterion), skip=[]), sequences())


def test_unknown_architectures_are_refused() -> None:
    class Flat(PreTrainedModel):
        def __init__(self) -> None:
            super().__init__(LlamaConfig())
            self.layer = nn.Linear(4, 4)

    with pytest.raises(
        UserError, match=r"Flat has no list of decoder blocks.*supported is every causal language model"
    ):
        select_masks(Flat(), replace(setting(criterion="hessian"), skip=[]), sequences())


def test_a_model_that_does_more_between_its_blocks_is_refused() -> None:
    lm = build("llama")
    lm.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    with pytest.raises(UserError, match=r"changes the hidden states between model.layers.0 and model.layers.1"):
        BlockWalk(lm, sequences(), passes=1, description="")


def test_sequences_longer_than_the_model_are_refused() -> None:
    with pytest.raises(UserError, match="sequences of 33 tokens are longer than the model's 32 positions"):
        select_masks(build("gpt2"), setting(criterion="hessian"), sequences(1, 33))


@pytest.mark.parametrize("criterion", ["hessian", "fisher"])
def test_a_linear_that_is_never_used_is_refused(criterion: str) -> None:
    lm = build("llama")
    lm.model.layers[2].mlp.spare = nn.Linear(4, 4)
    with pytest.raises(UserError, match=r"model.layers.2.mlp.spare takes no part in computing the calibration text"):
        select_masks(lm, setting(criterion=criterion), sequences())


def test_a_layer_that_sees_only_zeros_is_named() -> None:
    lm = build("llama")
    nn.init.zeros_(lm.model.layers[1].input_layernorm.weight)
    with pytest.raises(UserError, match=r"model.layers.1.self_attn.q_proj cannot be calibrated: its Hessian has no"):
        quantize_(lm, setting(), CalibrationConfig(), sequences())


def test_calibration_text_is_the_first_tokens_of_the_documents(tmp_path: Path, workspace: Workspace) -> None:
    tokenizer = load_tokenizer(workspace.teacher)
    (tmp_path / "a.txt").write_text("the model learns one bit per weight")
    (tmp_path / "b.txt").write_text("from a teacher that knows more " * 9)
    for before, after in (([0], [1]), ([], [1])):
        expected = [
            id
            for text in ("the model learns one bit per weight", "from a teacher that knows more " * 9)
            for id in (*before, *tokenizer.encode(text), *after)
        ]
        ids = read_calibration([str(tmp_path)], tokenizer, 3, 5, borders=(before, after))
        assert ids.flatten().tolist() == expected[:15]
        with pytest.raises(UserError, match=rf"100 sequences of 5 tokens, but .* holds {len(expected)} tokens in all"):
            read_calibration([str(tmp_path)], tokenizer, 100, 5, borders=(before, after))


def test_no_more_text_is_read_than_needed() -> None:
    def tokens() -> Any:
        yield from range(6)
        raise AssertionError("one token too many")

    assert cut_sequences(tokens(), 2, 3, "here").tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("criterion", ["hessian", "fisher"])
@pytest.mark.parametrize("rank", [0, 1])
def test_progress_is_shown_by_rank_0_alone(
    criterion: str, rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    select_masks(build("llama"), setting(criterion=criterion), sequences(1))
    assert bool(capsys.readouterr().err) == (rank == 0)
