"""BinaryLinear computed from bits: the same outputs and gradients as by torch."""

from __future__ import annotations

import pytest
import torch

from fbitrain.kernels import cpu, training
from fbitrain.model.linear import BinaryLinear


@pytest.mark.skipif(bool(cpu.levels()["portable"]), reason=f"no compiled kernels: {cpu.levels()['portable']}")
@pytest.mark.parametrize("scale", ["column", "row", "tensor"])
def test_outputs_and_gradients_agree_with_torch(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    layer, x, dy = BinaryLinear(96, 130, scale=scale), torch.randn(4, 50, 96), torch.randn(4, 50, 130)
    results = []
    for bits in (True, False):
        monkeypatch.setattr(training, "pays", lambda *sizes, bits=bits: bits)
        inputs = (x.clone().requires_grad_(), *layer.parameters())
        y = layer(inputs[0])
        results.append((y, *torch.autograd.grad(y, inputs, dy)))
    for got, wanted in zip(*results, strict=True):
        noise = (got.double() - wanted.double()).norm()
        assert float(20 * torch.log10(wanted.double().norm() / noise.clamp_min(1e-300))) > 100
