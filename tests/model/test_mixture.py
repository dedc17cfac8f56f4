"""OneBitLinear and MixtureOfScalesLinear against their formulas, one token at a time, and torch's SVD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fbitrain.model.mixture import MixtureOfScalesLinear, OneBitLinear, rank_one

N, K, E = 7, 33, 3


def make_mixture(ste: str = "clip", n_experts: int = E) -> MixtureOfScalesLinear:
    """Weights on both sides of 1, experts that differ."""
    torch.manual_seed(0)
    layer = MixtureOfScalesLinear(K, N, n_experts=n_experts, ste=ste, init_std=1.0, dtype=torch.float64)
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([0.0, -0.0, 1.0])
        layer.scale_in.add_(torch.randn_like(layer.scale_in))
        layer.scale_out.add_(torch.randn_like(layer.scale_out))
        layer.router.mul_(5)
    return layer


def make_input(*leading: int) -> Tensor:
    return torch.randn(*leading, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def plain_mixture(layer: MixtureOfScalesLinear, x: Tensor) -> Tensor:
    """For each token its own matrix diag(g A_out) S diag(g A_in), by autograd; the estimator as w - w.detach()."""
    w = layer.weight
    through = torch.where(w.detach().abs() <= 1, w, w.detach()) if layer.ste == "clip" else w
    signs = torch.where(w.detach() >= 0, 1.0, -1.0).double() + through - through.detach()
    tokens = []
    for token in x.reshape(-1, K):
        logits = torch.stack([(token * row).sum() for row in layer.router])
        gates = logits.exp() / logits.exp().sum()
        scale_in = sum(gate * row for gate, row in zip(gates, layer.scale_in, strict=True))
        scale_out = sum(gate * row for gate, row in zip(gates, layer.scale_out, strict=True))
        tokens.append((scale_out[:, None] * signs * scale_in[None, :]) @ token)
    return torch.stack(tokens).reshape(*x.shape[:-1], N)


@pytest.mark.parametrize("ste", ["clip", "identity"])
def test_mixture_and_its_gradients(ste: str) -> None:
    layer, x = make_mixture(ste), make_input(2, 3)
    y, wanted = layer(x), plain_mixture(layer, x)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    named = [x, *layer.parameters()]
    for found, expected in zip(torch.autograd.grad(y, named, dy), torch.autograd.grad(wanted, named, dy), strict=True):
        torch.testing.assert_close(found, expected)


def test_one_expert_is_onebit() -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixture = MixtureOfScalesLinear(K, N, n_experts=1, weight=weight, dtype=torch.float64)
    onebit = OneBitLinear(K, N, weight=weight, dtype=torch.float64)
    x = make_input(4)
    torch.testing.assert_close(mixture(x), onebit(x))


def test_onebit_scales_each_row_and_column() -> None:
    layer = OneBitLinear(K, N, dtype=torch.float64)
    effective = layer.effective_weight()
    for n in range(N):
        for k in range(K):
            sign = 1 if layer.weight[n, k] >= 0 else -1
            assert effective[n, k].item() == pytest.approx(sign * (layer.scale_out[0, n] * layer.scale_in[0, k]).item())
    x = make_input(3)
    layer(x).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
    signs = torch.where(layer.weight >= 0, 1.0, -1.0).double()
    torch.testing.assert_close(layer.scale_out.grad, ((x * layer.scale_in) @ signs.T).sum(0, keepdim=True))
    torch.testing.assert_close(layer.scale_in.grad, (x * (layer.scale_out @ signs)).sum(0, keepdim=True))
    torch.testing.assert_close(layer.weight.grad, layer.scale_out.T @ (x * layer.scale_in).sum(0, keepdim=True))


def test_onebit_with_its_layer_norm() -> None:
    """OneBit's equations (arXiv 2402.11295): Y = [(X ⊙ g) Sign(W)ᵀ] ⊙ h, Z = LayerNorm(Y), here token by token."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64)
    bias = torch.randn(N, generator=generator, dtype=torch.float64)
    layer = OneBitLinear(K, N, output_norm=True, weight=weight, bias=bias, dtype=torch.float64)
    g, h = layer.scale_in[0], layer.scale_out[0]
    w = layer.weight
    signs = torch.where(w.detach() >= 0, 1.0, -1.0).double() + w - w.detach()
    x, tokens = make_input(2, 3), []
    for token in x.reshape(-1, K):
        y = (signs @ (token * g)) * h
        centred = y - y.sum() / N
        tokens.append(centred / ((centred * centred).sum() / N + 1e-5).sqrt() + layer.bias)
    found, wanted = layer(x), torch.stack(tokens).reshape(2, 3, N)
    torch.testing.assert_close(found, wanted)
    dy, named = torch.randn_like(found), [x, *layer.parameters()]
    for a, b in zip(torch.autograd.grad(found, named, dy), torch.autograd.grad(wanted, named, dy), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="depends on the token"):
        layer.effective_weight()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (40, 70), (70, 40), (128, 128)])
def test_rank_one_is_the_leading_singular_pair(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    scale_in, scale_out = rank_one(weight)
    u, s, vh = torch.linalg.svd(weight.abs())
    torch.testing.assert_close(scale_out.T @ scale_in, s[0] * u[:, :1] @ vh[:1])
    torch.testing.assert_close(scale_in.norm(), scale_out.norm())
    assert (scale_in >= 0).all()
    assert (scale_out >= 0).all()


def test_rank_one_of_trained_looking_weights() -> None:
    """Outlier columns and rows make the second singular value large, which is where a power iteration is slow."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(300, 200, generator=generator)
    weight[:, :3] *= 40
    weight[:2] *= 40
    weight[2:, 3:] *= 0.01
    scale_in, scale_out = rank_one(weight)
    u, s, vh = torch.linalg.svd(weight.abs())
    best = weight.abs() - s[0] * u[:, :1] @ vh[:1]
    assert (weight.abs() - scale_out.T @ scale_in).norm() < 1.0001 * best.norm()


def test_rank_one_is_computed_wide_and_kept_in_the_weights_dtype() -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    layer = OneBitLinear(64, 64, weight=weight, dtype=torch.bfloat16)
    scale_in, _ = rank_one(weight.float())
    assert layer.scale_in.dtype == torch.bfloat16
    assert torch.equal(layer.scale_in, scale_in.bfloat16())


def test_experts_start_equal_and_part_in_the_first_step() -> None:
    torch.manual_seed(6)
    layer = MixtureOfScalesLinear(K, N, n_experts=E)
    assert all(torch.equal(row, layer.scale_in[0]) for row in layer.scale_in)
    bound = 1 / math.sqrt(K)
    assert layer.router.abs().max() <= bound
    assert layer.router.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)  # uniform
    layer(torch.randn(5, K)).square().sum().backward()
    assert layer.scale_in.grad is not None
    first, second, *_ = layer.scale_in.grad
    assert not torch.allclose(first, second, rtol=0.05)


def test_router_statistics() -> None:
    layer = make_mixture()
    x = make_input(2, 5).detach()
    layer(x)
    layer(x[:1])
    tokens = torch.cat([x.reshape(-1, K), x[0]])
    gates = F.softmax(tokens @ layer.router.T, dim=1)
    entropy = -(gates * gates.log()).sum()
    wanted = torch.cat([entropy.view(1), torch.tensor([15.0]), gates.sum(0)]).float()
    stats = layer.take_router_stats()
    torch.testing.assert_close(stats, wanted.detach())
    assert stats.dtype == torch.float32
    assert not stats.requires_grad
    assert (layer.take_router_stats() == 0).all()
    layer.eval()(x)
    assert (layer.take_router_stats() == 0).all()
    assert set(layer.state_dict()) == {"weight", "scale_in", "scale_out", "router"}


def test_a_gate_of_zero_has_no_entropy() -> None:
    layer = make_mixture()
    with torch.no_grad():
        layer.router.zero_()
        layer.router[0] = 1e6
    layer(torch.ones(3, K, dtype=torch.float64))
    assert layer.take_router_stats().tolist() == [0.0, 3.0, 3.0, 0.0, 0.0]


def test_statistics_survive_a_change_of_dtype() -> None:
    layer = MixtureOfScalesLinear(K, N).bfloat16()
    for _ in range(3):
        layer(torch.randn(100, K, dtype=torch.bfloat16))
    stats = layer.take_router_stats()
    assert stats[1] == 300  # no bf16 number
    assert stats[2:].sum().item() == pytest.approx(300, rel=1e-4)


@pytest.mark.parametrize("n_experts", [0, 65])
def test_an_impossible_number_of_experts_is_refused(n_experts: int) -> None:
    with pytest.raises(ValueError, match=f"n_experts={n_experts} must be from 1 to 64"):
        MixtureOfScalesLinear(8, 8, n_experts=n_experts)


def test_unknown_ste_is_refused() -> None:
    for layer_class in (OneBitLinear, MixtureOfScalesLinear):
        with pytest.raises(ValueError, match="ste='tanh' is unknown; choose identity or clip"):
            layer_class(8, 8, ste="tanh")
