"""BitNet's binary and ternary layers against the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fbitrain.kernels.reference import quantize_int8
from fbitrain.model.bitnet import BitNetLinear, mean_centred_sign, quantize_tokens, ternary

N, K = 6, 35


def make_weight() -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.05 + 0.02


def test_ternary_weight() -> None:
    """arXiv 2402.17764: RoundClip(W/γ, -1, 1), γ the mean magnitude of the matrix."""
    weight = make_weight()
    gamma = sum(abs(w) for w in weight.flatten().tolist()) / (N * K)
    wanted = [gamma * max(-1, min(1, round(w / gamma))) for w in weight.flatten().tolist()]
    assert ternary(weight).flatten().tolist() == pytest.approx(wanted)
    assert set((ternary(weight) / gamma).round().flatten().tolist()) == {-1.0, 0.0, 1.0}


def test_binary_weight() -> None:
    """arXiv 2310.11453: β·Sign(W - mean W), β the mean magnitude of W itself."""
    weight = make_weight()
    values = weight.flatten().tolist()
    mean, beta = sum(values) / (N * K), sum(abs(w) for w in values) / (N * K)
    assert mean > 0.01  # so that centring matters
    wanted = [beta if w >= mean else -beta for w in values]
    assert mean_centred_sign(weight).flatten().tolist() == pytest.approx(wanted)


def test_tokens_are_rounded_to_int8() -> None:
    x = torch.randn(3, 4, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes, step = quantize_tokens(x)
    assert step.shape == (3, 4, 1)
    for token, found, spacing in zip(x.reshape(-1, K), codes.reshape(-1, K), step.flatten(), strict=True):
        largest = max(abs(value) for value in token.tolist())
        assert spacing.item() == pytest.approx(largest / 127)
        assert found.tolist() == [round(value * 127 / largest) for value in token.tolist()]
    assert codes.abs().amax() == 127


def test_codes_are_those_of_the_kernels() -> None:
    """Ties included, of which multiples of a power of two have many."""
    x = torch.randint(-254, 255, (50, K), generator=torch.Generator().manual_seed(5)) / 8
    x[0], x[1] = 0.0, 1e-40
    codes, step = quantize_tokens(x)
    wanted, scale = quantize_int8(x)
    assert torch.equal(codes.to(torch.int8), wanted)
    assert torch.equal(codes * step, wanted * scale)


def test_codes_are_whole_numbers_in_bf16() -> None:
    codes, _ = quantize_tokens(torch.randn(5, K, generator=torch.Generator().manual_seed(2)).bfloat16())
    assert codes.dtype == torch.bfloat16
    assert torch.equal(codes, codes.round())
    assert codes.abs().amax() == 127


def test_a_token_of_zeros_stays_zero() -> None:
    x = torch.zeros(2, K, requires_grad=True)
    layer = BitNetLinear(K, N, method="ternary")
    y = layer(x)
    assert (y == 0).all()
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.effective_weight().sum(0).expand(2, K))


@pytest.mark.parametrize("method", ["bitnet", "ternary"])
def test_layer_and_its_straight_through_gradients(method: str) -> None:
    weight = make_weight()
    layer = BitNetLinear(K, N, method=method, weight=weight, dtype=torch.float64)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    dy = torch.randn(5, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    y = layer(x)
    y.backward(dy)
    largest = x.detach().abs().amax(1, keepdim=True)
    rounded = (x.detach() * 127 / largest).round() * largest / 127
    effective = {"bitnet": mean_centred_sign, "ternary": ternary}[method](weight)
    torch.testing.assert_close(y, F.linear(rounded, effective))
    torch.testing.assert_close(x.grad, dy @ effective)
    torch.testing.assert_close(layer.weight.grad, dy.T @ rounded)


def test_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method='int4' is unknown; choose bitnet or ternary"):
        BitNetLinear(8, 8, method="int4")
