"""BiBench's five weight binarizers: values and gradients against the papers' closed forms, weight by weight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fbitrain.model.bibench import BINARIZERS, PAPER, BiBenchLinear
from fbitrain.model.method_table import METHODS

N, K = 4, 25


def make_weight() -> Tensor:
    """On both sides of ±1, with exact zeros and ones."""
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[0, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    return weight


def backward(
    method: str, weight: Tensor, variant: str = "paper"
) -> tuple[list[list[float]], list[list[float]], list[list[float]]]:
    """(ŵ, a random dŵ, dW), as lists."""
    leaf = weight.clone().requires_grad_()
    effective = BINARIZERS[variant][method](leaf)
    upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(effective, leaf, upstream)
    return effective.tolist(), upstream.tolist(), gradient.tolist()


def approx(values: list[list[float]]) -> object:
    return [pytest.approx(row, rel=1e-9, abs=1e-12) for row in values]


def sign(w: float) -> int:
    return 1 if w >= 0 else -1


def row_means(weight: Tensor) -> list[float]:
    return [sum(abs(w) for w in row) / len(row) for row in weight.tolist()]


def test_every_method_is_there() -> None:
    assert list(PAPER) == [name for name, method in METHODS.items() if method.layer == "bibench.BiBenchLinear"]


def test_bnn() -> None:
    """Hubara et al. 2016: g·1[|w| <= 1], no scale."""
    weight = make_weight()
    effective, upstream, gradient = backward("bnn", weight)
    assert effective == [[sign(w) for w in row] for row in weight.tolist()]
    assert gradient == [
        [g if abs(w) <= 1 else 0.0 for w, g in zip(row, row_g, strict=True)]
        for row, row_g in zip(weight.tolist(), upstream, strict=True)
    ]


@pytest.mark.parametrize("method", ["xnor", "bireal", "fda"])
def test_value_is_the_optimal_scale_times_the_sign(method: str) -> None:
    """Rastegari et al. 2016: α = ||W||₁ / n."""
    weight = make_weight()
    effective, _, _ = backward(method, weight)
    wanted = [[a * sign(w) for w in row] for a, row in zip(row_means(weight), weight.tolist(), strict=True)]
    assert effective == approx(wanted)


def test_xnor_gradient() -> None:
    """Rastegari et al. 2016, section 3.1: ∂C/∂W_i = ∂C/∂W̃_i · (1/n + ∂sign/∂W_i · α)."""
    weight = make_weight()
    _, upstream, gradient = backward("xnor", weight)
    wanted = [
        [g * (1 / K + (a if abs(w) <= 1 else 0)) for w, g in zip(row, row_g, strict=True)]
        for a, row, row_g in zip(row_means(weight), weight.tolist(), upstream, strict=True)
    ]
    assert gradient == approx(wanted)


def approx_sign_slope(w: float) -> float:
    """Liu et al. 2018, ApproxSign: 2 + 2w on [-1, 0), 2 - 2w on [0, 1), else 0."""
    if -1 <= w < 0:
        return 2 + 2 * w
    return 2 - 2 * w if 0 <= w < 1 else 0


def test_bireal_gradient() -> None:
    """Liu et al. 2018, the magnitude-aware gradient: ||W||₁/n times the slope."""
    weight = make_weight()
    _, upstream, gradient = backward("bireal", weight)
    wanted = [
        [g * a * approx_sign_slope(w) for w, g in zip(row, row_g, strict=True)]
        for a, row, row_g in zip(row_means(weight), weight.tolist(), upstream, strict=True)
    ]
    assert gradient == approx(wanted)


def test_fda_gradient() -> None:
    """The derivative of the first ten terms of the Fourier series 4/π·Σ sin((2i+1)ωw)/(2i+1), Xu et al. 2021."""
    weight, omega = make_weight(), 0.1
    _, upstream, gradient = backward("fda", weight)

    def slope(w: float) -> float:
        series = sum(math.cos((2 * i + 1) * omega * w) for i in range(10))
        return 4 * omega / math.pi * series if abs(w) <= 1 else 0.0

    wanted = [
        [g * a * slope(w) for w, g in zip(row, row_g, strict=True)]
        for a, row, row_g in zip(row_means(weight), weight.tolist(), upstream, strict=True)
    ]
    assert gradient == approx(wanted)
    assert min(slope(w / 100) for w in range(-100, 101)) > 0


def recu_row(row: Tensor) -> tuple[list[float], list[float], float, float]:
    """(standardized, clamped, σ, limit) of a row: ReCU at τ = 0.99, Xu et al. 2021."""
    values = row.tolist()
    mean = sum(values) / K
    deviation = math.sqrt(sum((w - mean) ** 2 for w in values) / K)
    u = [(w - mean) / deviation for w in values]
    limit = -sum(abs(value) for value in u) / K * math.log(2 - 2 * 0.99)
    return u, [max(-limit, min(limit, value)) for value in u], deviation, limit


def with_dead_weights() -> Tensor:
    weight = make_weight() + 0.4
    weight[1, 5], weight[2, 6] = 9.0, -9.0
    return weight


def test_recu_value() -> None:
    weight = with_dead_weights()
    effective, _, _ = backward("recu", weight)
    for row, found in zip(weight, effective, strict=True):
        u, v, deviation, _ = recu_row(row)
        alpha = deviation * sum(abs(value) for value in v) / K
        assert found == pytest.approx([alpha * sign(value) for value in u])
    assert abs(recu_row(weight[1])[0][5]) > recu_row(weight[1])[3]  # the row has a weight beyond the quantile


def test_recu_gradient() -> None:
    """Back through clamp and standardization: (h - mean h - u·mean(h·u)) / σ with h = α·g·1[|u| <= limit]."""
    weight = with_dead_weights()
    _, upstream, gradient = backward("recu", weight)
    for row, row_g, found in zip(weight, upstream, gradient, strict=True):
        u, v, deviation, limit = recu_row(row)
        alpha = deviation * sum(abs(value) for value in v) / K
        h = [alpha * g if abs(value) <= limit else 0.0 for g, value in zip(row_g, u, strict=True)]
        mean_h = sum(h) / K
        mean_hu = sum(a * b for a, b in zip(h, u, strict=True)) / K
        wanted = [(a - mean_h - value * mean_hu) / deviation for a, value in zip(h, u, strict=True)]
        assert found == pytest.approx(wanted, abs=1e-12)


def test_the_benchmarks_xnor_centres_each_row() -> None:
    """c = w - mean w, α = mean |c|, ŵ = α·sign(c); dc = dŵ·α·1[|c| <= 1], and dw = dc - mean dc: the centring's."""
    weight = make_weight() + 0.2
    effective, upstream, gradient = backward("xnor", weight, "benchmark")
    for row, row_g, value, found in zip(weight.tolist(), upstream, effective, gradient, strict=True):
        centred = [w - sum(row) / K for w in row]
        alpha = sum(map(abs, centred)) / K
        assert value == pytest.approx([alpha * sign(c) for c in centred])
        by_centred = [g * alpha * (abs(c) <= 1) for c, g in zip(centred, row_g, strict=True)]
        assert found == pytest.approx([g - sum(by_centred) / K for g in by_centred], abs=1e-12)


def test_the_benchmarks_bireal_clips_and_leaves_alpha_out() -> None:
    weight = make_weight()
    effective, upstream, gradient = backward("bireal", weight, "benchmark")
    assert effective == backward("bireal", weight)[0]
    assert gradient == [
        [g if abs(w) <= 1 else 0.0 for w, g in zip(row, row_g, strict=True)]
        for row, row_g in zip(weight.tolist(), upstream, strict=True)
    ]


def test_the_benchmarks_recu_has_a_gradient_2_root_2_times_as_large() -> None:
    weight = with_dead_weights()
    effective, _, gradient = backward("recu", weight, "benchmark")
    wanted, _, paper = backward("recu", weight)
    assert effective == approx(wanted)
    assert gradient == approx([[2 * math.sqrt(2) * g for g in row] for row in paper])


@pytest.mark.parametrize("variant", BINARIZERS)
@pytest.mark.parametrize("method", PAPER)
def test_the_layer_uses_its_method(method: str, variant: str) -> None:
    weight = make_weight()
    layer = BiBenchLinear(K, N, method=method, variant=variant, weight=weight, dtype=torch.float64)
    x, dy = torch.randn(3, K, dtype=torch.float64), torch.randn(3, N, dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    leaf = weight.clone().requires_grad_()
    effective = BINARIZERS[variant][method](leaf)
    torch.testing.assert_close(y, x @ effective.T)
    (wanted,) = torch.autograd.grad(effective, leaf, dy.T @ x)
    torch.testing.assert_close(layer.weight.grad, wanted)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method='dorefa' is unknown; choose one of bnn, xnor, bireal, recu, fda"):
        BiBenchLinear(8, 8, method="dorefa")
    with pytest.raises(ValueError, match="variant='code' is unknown; choose one of paper, benchmark"):
        BiBenchLinear(8, 8, method="xnor", variant="code")
