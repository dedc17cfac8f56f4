"""GPTQ-PB against a slow reference with explicit inverse Hessians, and what must hold of its results."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fbitrain.model.gptq_pb import PartialWeights, gptq_partial
from fbitrain.model.hessian import SingularHessianError
from fbitrain.model.partial import PartialBinaryLinear
from fbitrain.model.salience import magnitude_scores, select_mask


def problem(n: int, k: int, seed: int, fraction: float = 0.2) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [n, k], correlated inputs [4k, k] in fp64, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    mixing = torch.randn(k, k, generator=generator, dtype=torch.float64)
    x = torch.randn(4 * k, k, generator=generator, dtype=torch.float64) @ mixing
    return w, x, select_mask(magnitude_scores(w), fraction)


def hessian_of(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def reference(w: Tensor, hessian: Tensor, mask: Tensor, group_size: int, damping: float) -> list[list[float]]:
    """ŵ by Optimal Brain Quantization in fixed order: after each column the inverse Hessian of the columns that are
    left comes from Gaussian elimination (arXiv 2210.17323, equation 3). One row at a time, on Python numbers."""
    n, k = w.shape
    ridge = damping * float(hessian.diagonal().mean())
    result = []
    for row in range(n):
        values, salient = w[row].double().tolist(), mask[row].tolist()
        inverse = torch.linalg.inv(hessian + ridge * torch.eye(k, dtype=torch.float64))
        step = max([abs(v) for v, chosen in zip(values, salient, strict=True) if chosen], default=0.0) / 127
        alpha = 0.0
        out = []
        for i in range(k):
            if i % group_size == 0:
                ordinary = [abs(values[j]) for j in range(i, i + group_size) if not salient[j]]
                alpha = sum(ordinary) / len(ordinary) if ordinary else 0.0
            if salient[i]:
                quantized = max(-127, min(127, round(values[i] / step))) * step
            else:
                quantized = alpha if values[i] >= 0 else -alpha
            out.append(quantized)
            error = (values[i] - quantized) / float(inverse[i, i])
            for j in range(i + 1, k):
                values[j] -= error * float(inverse[i, j])
            inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        result.append(out)
    return result


def sqnr_db(expected: Tensor, actual: Tensor) -> float:
    noise = (expected - actual).double().square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(expected.double().square().sum().item() / noise)


def output_error(part: PartialWeights, w: Tensor, x: Tensor) -> float:
    return (x @ (part.effective_weight() - w).double().T).square().mean().item()


@pytest.mark.parametrize("group_size", [0, 12, 4])
@pytest.mark.parametrize("block_size", [1, 5, 128])
def test_it_agrees_with_optimal_brain_quantization(group_size: int, block_size: int) -> None:
    w, x, mask = problem(6, 24, seed=3)
    part = gptq_partial(w, hessian_of(x), mask, group_size=group_size, damping=0.02, block_size=block_size)
    expected = torch.tensor(reference(w, hessian_of(x), mask, group_size or 24, 0.02))
    assert sqnr_db(expected, part.effective_weight()) > 100


def test_fp32_hessians_lose_little() -> None:
    w, x, mask = problem(16, 40, seed=4)
    exact = gptq_partial(w, hessian_of(x), mask)
    single = gptq_partial(w, hessian_of(x).float(), mask)
    assert sqnr_db(exact.effective_weight(), single.effective_weight()) > 40


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("group_size", [0, 16])
def test_feedback_lowers_the_error_of_the_output(seed: int, group_size: int) -> None:
    w, x, mask = problem(24, 48, seed, fraction=0.1)
    with_feedback = gptq_partial(w, hessian_of(x), mask, group_size=group_size)
    without = gptq_partial(w, None, mask, group_size=group_size)
    assert output_error(with_feedback, w, x) < 0.9 * output_error(without, w, x)


def test_more_salient_weights_lower_the_error() -> None:
    w, x, _ = problem(24, 48, seed=5)
    errors = []
    for fraction in (0.05, 0.1, 0.3, 0.6, 0.9):
        mask = select_mask(magnitude_scores(w), fraction)
        errors.append(output_error(gptq_partial(w, hessian_of(x), mask), w, x))
    assert errors == sorted(errors, reverse=True)


def test_without_feedback_each_weight_is_rounded_by_itself() -> None:
    w, _, mask = problem(5, 12, seed=6, fraction=0.3)
    part = gptq_partial(w, None, mask)
    for row in range(5):
        ordinary = [abs(v) for v, m in zip(w[row].tolist(), mask[row].tolist(), strict=True) if not m]
        step = max((abs(v) for v, m in zip(w[row].tolist(), mask[row].tolist(), strict=True) if m), default=0.0) / 127
        for k in range(12):
            value = float(w[row, k])
            expected = (
                round(value / step) * step if mask[row, k] else math.copysign(sum(ordinary) / len(ordinary), value)
            )
            assert float(part.effective_weight()[row, k]) == pytest.approx(expected, rel=1e-5)


def test_with_every_weight_salient_it_is_8_bit_quantization() -> None:
    w, x, _ = problem(8, 32, seed=7)
    everything = torch.ones_like(w, dtype=torch.bool)
    without = gptq_partial(w, None, everything)
    assert (without.effective_weight() - w).abs().max() <= (w.abs().amax(1) / 127 / 2).max() * 1.001
    assert sqnr_db(w, without.effective_weight()) > 40
    with_feedback = gptq_partial(w, hessian_of(x), everything)
    assert output_error(with_feedback, w, x) < output_error(without, w, x)
    assert not with_feedback.alpha.any()


def test_salient_weights_in_fp16_are_fp16_numbers() -> None:
    w, x, mask = problem(8, 32, seed=8)
    part = gptq_partial(w, hessian_of(x), mask, salient_dtype="float16")
    assert part.codes is None
    assert part.scale is None
    salient = part.effective_weight()[mask]
    assert torch.equal(salient.half().float(), salient)


def test_dead_inputs_keep_their_signs_and_harm_nobody() -> None:
    w, x, mask = problem(10, 20, seed=9)
    x[:, [0, 7, 19]] = 0
    part = gptq_partial(w, hessian_of(x), mask)
    dead = torch.tensor([0, 7, 19])
    assert torch.equal(part.effective_weight()[:, dead] >= 0, w[:, dead] >= 0)
    assert part.effective_weight().isfinite().all()
    assert output_error(part, w, x) < output_error(gptq_partial(w, None, mask), w, x)


def test_fewer_tokens_than_inputs_are_enough() -> None:
    w, x, mask = problem(10, 40, seed=10)
    few = x[:15]
    error = output_error(gptq_partial(w, hessian_of(few).float(), mask), w, few)
    assert error < 0.8 * output_error(gptq_partial(w, None, mask), w, few)


def test_a_useless_hessian_is_refused() -> None:
    w, _, mask = problem(4, 8, seed=11)
    with pytest.raises(SingularHessianError):
        gptq_partial(w, torch.full((8, 8), float("nan")), mask)


@pytest.mark.parametrize("salient_dtype", ["int8", "float16"])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_layer_made_from_it_has_the_same_effective_weight(
    salient_dtype: str, group_size: int, feedback: bool
) -> None:
    w, x, mask = problem(9, 48, seed=12)
    mask[0], mask[1] = True, False  # a row without ordinary weights, one without salient ones
    hessian = hessian_of(x).float() if feedback else None
    part = gptq_partial(w, hessian, mask, group_size=group_size, salient_dtype=salient_dtype)
    layer = PartialBinaryLinear(
        48,
        9,
        mask=part.mask,
        salient_dtype=salient_dtype,
        scale="group" if group_size else "row",
        group_size=group_size or 128,
        weight=part.weight,
    )
    if part.codes is not None and part.scale is not None:
        layer.load_salient(part.codes, part.scale)
    assert torch.equal(layer.effective_weight(), part.effective_weight())


def test_the_inputs_are_left_alone() -> None:
    w, x, mask = problem(4, 8, seed=13)
    hessian = hessian_of(x)
    before = w.clone(), hessian.clone(), mask.clone()
    gptq_partial(w, hessian, mask)
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])
    assert torch.equal(mask, before[2])


def test_bad_arguments_are_refused() -> None:
    w, x, mask = problem(4, 8, seed=14)
    with pytest.raises(ValueError, match="not a multiple of group_size=3"):
        gptq_partial(w, hessian_of(x), mask, group_size=3)
    with pytest.raises(ValueError, match="mask must be bool"):
        gptq_partial(w, hessian_of(x), mask[:2])
    with pytest.raises(ValueError, match="mask must be bool"):
        gptq_partial(w, hessian_of(x), mask.float())
