"""Straight-through estimators and start values of the scales."""

from __future__ import annotations

import pytest
import torch

from fbitrain.model.binarize import init_scales, scale_shape, sign_ste, ste_gradient

EDGES = [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.0001, -1.0001, 5.0]


@pytest.mark.parametrize(("ste", "passed"), [("identity", [1] * 9), ("clip", [1, 1, 1, 1, 1, 1, 0, 0, 0])])
def test_sign_ste(ste: str, passed: list[int]) -> None:
    w = torch.tensor(EDGES, requires_grad=True)
    grad = torch.arange(1.0, 10.0)
    signs = sign_ste(w, ste)
    signs.backward(grad)
    assert signs.tolist() == [1, 1, 1, -1, 1, -1, 1, -1, 1]
    assert w.grad is not None
    assert w.grad.tolist() == [g * p for g, p in zip(grad.tolist(), passed, strict=True)]


def test_unknown_ste_is_refused() -> None:
    with pytest.raises(ValueError, match="ste='tanh' is unknown; choose identity or clip"):
        ste_gradient(torch.ones(1), torch.ones(1), "tanh")


@pytest.mark.parametrize("scale", ["column", "row", "tensor"])
def test_init_scales_with_shift(scale: str) -> None:
    """Against loops over the weights that share a scale."""
    w = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double() + 0.3
    alpha, beta = init_scales(w, scale, True, 1)
    assert beta is not None
    assert alpha.shape == beta.shape == scale_shape(scale, 5, 6, 1)
    sharers = {"column": list(w.T), "row": list(w), "tensor": [w]}[scale]
    for a, b, values in zip(alpha.flatten(), beta.flatten(), sharers, strict=True):
        mean = sum(values.flatten().tolist()) / values.numel()
        assert b.item() == pytest.approx(mean)
        assert a.item() == pytest.approx(sum(abs(v - mean) for v in values.flatten().tolist()) / values.numel())


@pytest.mark.parametrize("scale", ["column", "row", "tensor", "group"])
def test_init_scales_without_shift_is_the_mean_magnitude(scale: str) -> None:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) + 0.3
    alpha, beta = init_scales(w, scale, False, 3)
    wanted = {
        "column": w.abs().mean(0, keepdim=True),
        "row": w.abs().mean(1, keepdim=True),
        "tensor": w.abs().mean().reshape(1, 1),
        "group": torch.stack([w[:, :3].abs().mean(1), w[:, 3:].abs().mean(1)], dim=1),
    }[scale]
    assert beta is None
    torch.testing.assert_close(alpha, wanted)


def test_init_scales_of_one_row_or_column() -> None:
    w = torch.tensor([[1.0, -3.0]])
    alpha, beta = init_scales(w, "column", True, 1)
    assert beta is not None
    assert (alpha.tolist(), beta.tolist()) == ([[0.0, 0.0]], [[1.0, -3.0]])


def test_init_scales_refuses_what_does_not_exist() -> None:
    with pytest.raises(ValueError, match="scale='colum' is unknown"):
        init_scales(torch.ones(2, 2), "colum", True, 1)
    with pytest.raises(ValueError, match="no shift"):
        init_scales(torch.ones(2, 2), "group", True, 2)
