"""What every layer that trains low-bit weights must do, whatever its formula: each method through the same checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fbitrain.model.config import BinarizeConfig, SalientConfig
from fbitrain.model.latent import LatentLinear
from fbitrain.model.method_table import METHODS
from fbitrain.model.methods import layer_class

N, K, G = 7, 66, 11
MASK = torch.rand(N, K, generator=torch.Generator().manual_seed(0)) < 0.1


def salient(method: str, dtype: str, **settings: Any) -> BinarizeConfig:
    return BinarizeConfig(method=method, beta=False, salient=SalientConfig(dtype=dtype), **settings)


LAYERS: dict[str, BinarizeConfig] = {
    **{name: BinarizeConfig(method=name) for name, method in METHODS.items() if not method.salient},
    "partial int8": salient("partial", "int8", scale="row"),
    "partial fp16 by group": salient("partial", "float16", scale="group", group_size=G),
    "cherry": salient("cherry", "float16", scale="row", bits=3),
    "cherry minmax": salient("cherry", "float16", scale="group", group_size=G, bits=3, grid="minmax"),
    "onebit with norm": BinarizeConfig(method="onebit", output_norm=True),
    "xnor of the benchmark": BinarizeConfig(method="xnor", variant="benchmark"),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def build(kind: str, **latent: Any) -> LatentLinear:
    return layer_class(LAYERS[kind]).make(LAYERS[kind], MASK, {"in_features": K, "out_features": N, **latent})


def make(kind: str, dtype: torch.dtype = torch.float32) -> LatentLinear:
    torch.manual_seed(1)
    weight, bias = torch.randn(N, K) * 0.05, torch.randn(N)
    return build(kind, weight=weight, bias=bias, dtype=dtype)


def make_input(*leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*leading, K, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def gradients(layer: LatentLinear, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    named = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))


def sqnr(found: Tensor, wanted: Tensor) -> float:
    """Signal to quantization noise, in dB."""
    noise = (found.double() - wanted.double()).square().sum()
    return (10 * torch.log10(wanted.double().square().sum() / noise)).item()


@each_layer
def test_forward_is_the_product_with_the_effective_weight(kind: str) -> None:
    layer, x = make(kind), make_input(2, 3)
    if not LAYERS[kind].has_fixed_weights:
        with pytest.raises(ValueError, match="depends on the token"):
            layer.effective_weight()
        return
    effective = layer.effective_weight()
    assert effective.shape == (N, K)
    assert not effective.requires_grad
    wanted = F.linear(x, effective, layer.bias)
    # Activations of BitNet's layers are rounded to 8 bits: about 40 dB.
    assert sqnr(layer(x), wanted) > (35 if LAYERS[kind].traits.int8_activations else 120)


@each_layer
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_input(kind: str, parameter_dtype: torch.dtype) -> None:
    layer, x = make(kind, parameter_dtype), make_input(2, 3, dtype=torch.bfloat16)
    exact = make(kind)
    exact.load_state_dict(layer.state_dict())
    y, exact_x = layer(x), x.detach().float().requires_grad_()
    wanted = exact(exact_x)
    assert y.dtype == torch.bfloat16
    assert sqnr(y, wanted) > 40
    found, wanted_gradients = gradients(layer, x, y), gradients(exact, exact_x, wanted)
    for name, gradient in found.items():
        assert gradient.dtype == (torch.bfloat16 if name == "x" else parameter_dtype), name
        if name != "router":  # 0 but for rounding while the experts are equal
            assert sqnr(gradient, wanted_gradients[name]) > 35, name


@each_layer
@pytest.mark.parametrize("backward_inside", [False, True])
def test_under_autocast(kind: str, backward_inside: bool) -> None:
    """As with torch.nn.Linear: the output has autocast's dtype, every gradient the dtype of what it belongs to."""
    layer, x = make(kind), make_input(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        found = gradients(layer, x, y) if backward_inside else {}
    found = found or gradients(layer, x, y)
    exact, exact_x = make(kind), make_input(2, 3)
    wanted = exact(exact_x)
    wanted_gradients = gradients(exact, exact_x, wanted)
    assert y.dtype == torch.bfloat16
    assert sqnr(y, wanted) > 40
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32, name
        if name != "router":  # 0 but for rounding while the experts are equal
            assert sqnr(gradient, wanted_gradients[name]) > 35, name
    doubles = torch.randn(2, K, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.double()(doubles).dtype == torch.float64


@each_layer
def test_no_matrix_is_kept_for_backward_but_the_weight(kind: str) -> None:
    layer, x = make(kind), make_input(5)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    matrices = {tensor.data_ptr() for tensor in kept if tensor.numel() >= N * K}
    assert matrices == {layer.weight.data_ptr()}


@each_layer
def test_parameters_may_be_away_between_forward_and_backward(kind: str) -> None:
    """What ZeRO-3 does: it empties parameters after forward and puts their values into new memory for backward."""
    layer, x = make(kind), make_input(2, 3)
    wanted = gradients(layer, x, layer(x))
    y = layer(x)
    for parameter in layer.parameters():
        values = parameter.data
        parameter.data = torch.empty(0, dtype=values.dtype)
        parameter.data = values.clone()
        values.zero_()
    torch.testing.assert_close(gradients(layer, x, y), wanted, rtol=0, atol=0)


@each_layer
def test_activation_checkpointing(kind: str) -> None:
    layer, x = make(kind), make_input(2, 3)
    y = checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(gradients(layer, x, y), gradients(layer, x, layer(x)), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["partial int8", "ternary", "mixture_of_scales"])
def test_compiles(kind: str) -> None:
    """In pieces: torch.compile goes round the products."""
    torch.compiler.reset()  # all layers share one forward, whose variants torch counts
    layer, x = make(kind), make_input(2, 3)
    compiled = torch.compile(layer, backend="aot_eager")
    torch.testing.assert_close(gradients(layer, x, compiled(x)), gradients(layer, x, layer(x)))


def test_compiles_under_autocast() -> None:
    torch.compiler.reset()
    layer, x = make("binary"), make_input(2, 3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, wanted = compiled(x), layer(x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients(layer, x, y), gradients(layer, x, wanted))


@each_layer
def test_one_gradient_alone(kind: str) -> None:
    layer, x = make(kind), make_input(5)
    everything = gradients(layer, x, layer(x))
    named = {"x": x, **dict(layer.named_parameters())}
    for wanted in named:
        for name, tensor in named.items():
            tensor.requires_grad_(name == wanted)
        y = layer(x)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
        (found,) = torch.autograd.grad(y, named[wanted], dy)
        torch.testing.assert_close(found, everything[wanted], rtol=1e-5, atol=1e-6)


@each_layer
def test_empty_and_strided_input(kind: str) -> None:
    layer, x = make(kind), make_input(0)
    y = layer(x)
    assert y.shape == (0, N)
    assert all((gradient == 0).all() for gradient in gradients(layer, x, y).values())
    x = make_input(3, 2)
    assert layer(x[0, 0]).shape == (N,)
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))


@each_layer
def test_a_loaded_state_dict_is_the_whole_layer(kind: str) -> None:
    layer, x = make(kind), make_input(4)
    torch.manual_seed(9)
    other = build(kind, bias=torch.zeros(N))
    assert not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@each_layer
def test_without_a_bias(kind: str) -> None:
    torch.manual_seed(1)
    layer, x = build(kind, weight=torch.randn(N, K) * 0.05), make_input(4)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    if not LAYERS[kind].traits.routed:  # whose router is drawn behind the weight and the bias
        torch.testing.assert_close(layer(x) + make(kind).bias, make(kind)(x))
    assert all((gradient != 0).any() for gradient in gradients(layer, x, layer(x)).values())


@each_layer
def test_zero_weights_make_no_nan(kind: str) -> None:
    layer, x = build(kind, weight=torch.zeros(N, K)), make_input(3)
    y = layer(x)
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(layer, x, y).values())


@each_layer
def test_a_step_downhill_lowers_the_loss(kind: str) -> None:
    """The estimators point somewhere useful: fitting a random linear map, the error falls by a third at least."""
    torch.manual_seed(4)
    layer, x = build(kind, weight=torch.randn(N, K) * 0.05), torch.randn(256, K)
    target = F.linear(x, torch.randn(N, K) * (1 if kind == "bnn" else 0.05))  # bnn's weights are ±1
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(100):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 2 / 3
