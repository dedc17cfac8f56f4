"""Layers and schedules of runs that begin in full precision: each share, each method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fbitrain.model.binarize import init_scales
from fbitrain.model.bitnet import BitNetLinear
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.latent import LatentLinear
from fbitrain.model.linear import BinaryLinear
from fbitrain.model.method_table import METHODS
from fbitrain.model.methods import layer_class
from fbitrain.model.mixture import rank_one
from fbitrain.model.phases import binary_share, first_binary_step, phase_problems, scales_begin, unfinished_phase

N, K, G = 7, 66, 11
LAYERS: dict[str, BinarizeConfig] = {
    **{name: BinarizeConfig(method=name) for name, method in METHODS.items() if not method.salient},
    "binary row": BinarizeConfig(scale="row", ste="clip"),
    "binary group": BinarizeConfig(scale="group", beta=False, group_size=G),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def make(kind: str, share: float | None = None, dtype: torch.dtype = torch.float32, bias: bool = True) -> LatentLinear:
    torch.manual_seed(1)
    weight, shift = torch.randn(N, K) * 0.05, torch.randn(N) if bias else None
    latent = {"in_features": K, "out_features": N, "weight": weight, "bias": shift, "dtype": dtype}
    layer = layer_class(LAYERS[kind]).make(LAYERS[kind], None, latent)
    if share is not None:
        layer.set_binary_share(share)
    return layer


def make_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def gradients(layer: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    named = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), dy, allow_unused=True), strict=True))


def twin(layer: LatentLinear) -> nn.Linear:
    linear = nn.Linear(K, N, bias=layer.bias is not None, dtype=layer.weight.dtype)
    linear.load_state_dict({name: t for name, t in layer.state_dict().items() if name in ("weight", "bias")})
    return linear


@each_layer
@each_dtype
@pytest.mark.parametrize("bias", [True, False])
def test_a_share_of_0_is_an_ordinary_linear(kind: str, dtype: torch.dtype, bias: bool) -> None:
    layer, x = make(kind, 0, dtype, bias), make_input(dtype)
    linear = twin(layer)
    y, wanted = layer(x), linear(x)
    assert torch.equal(y, wanted)
    found, same = gradients(layer, x, y), gradients(linear, x, wanted)
    for name, gradient in same.items():
        assert gradient is not None
        assert torch.equal(found.pop(name), gradient), name  # type: ignore[arg-type]
    assert all(gradient is None for gradient in found.values()), "scales are no part of a full-precision product"
    assert torch.equal(layer.effective_weight(), layer.weight)


@each_layer
@each_dtype
def test_a_share_of_1_is_the_layer_without_phases(kind: str, dtype: torch.dtype) -> None:
    plain, layer, x = make(kind, None, dtype), make(kind, 0.5, dtype), make_input(dtype)
    layer.set_binary_share(1)
    assert torch.equal(layer(x), plain(x))
    torch.testing.assert_close(gradients(layer, x, layer(x)), gradients(plain, x, plain(x)), rtol=0, atol=0)


@each_layer
@pytest.mark.parametrize("share", [0.25, 2 / 3])
def test_a_mix_is_the_weighted_sum_of_both(kind: str, share: float) -> None:
    """The layer alone and an ordinary Linear, added outside; autograd adds their gradients."""
    mixed, plain, x = make(kind, share), make(kind), make_input()
    y = mixed(x)
    wanted = (1 - share) * twin(plain)(x) + share * plain(x)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-6)
    found = gradients(mixed, x, y)
    of_binary, of_full = gradients(plain, x, plain(x)), gradients(linear := twin(plain), x, linear(x))
    for name, gradient in found.items():
        full = of_full.get(name)
        binary = of_binary[name]
        assert gradient is not None
        assert binary is not None
        sum_of_both = share * binary + (0 if full is None else (1 - share) * full)
        torch.testing.assert_close(gradient, sum_of_both, rtol=1e-4, atol=1e-5)


@each_layer
def test_the_effective_weight_follows_the_share(kind: str) -> None:
    layer, x = make(kind, 0.25), make_input()
    if kind == "mixture_of_scales":
        with pytest.raises(ValueError, match="depends on the token"):
            layer.effective_weight()
        return
    # BitNet's layers round activations to int8 in their share of the product.
    close = {"rtol": 0.1, "atol": 0.02} if isinstance(layer, BitNetLinear) else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(layer(x), F.linear(x, layer.effective_weight(), layer.bias), **close)


@each_layer
def test_the_share_is_no_part_of_the_state(kind: str) -> None:
    layer = make(kind, 0.5)
    assert layer.state_dict().keys() == make(kind).state_dict().keys()
    layer.to(torch.bfloat16)
    layer.set_binary_share(1 / 3)  # in bf16, 0.3340
    ones = torch.ones(1, K, dtype=torch.float64)
    wide = layer.double()
    wanted = make(kind).to(torch.bfloat16).double()
    torch.testing.assert_close(wide(ones), twin(wanted)(ones) * 2 / 3 + wanted(ones) / 3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["binary", "binary group", "ternary", "mixture_of_scales"])
def test_torch_compile_compiles_once_per_phase(kind: str) -> None:
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(graph)
        return graph.forward

    layer, x = make(kind, 0), make_input()
    compiled = torch.compile(layer, backend=count)
    sizes = []
    for share in (0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1):
        layer.set_binary_share(share)
        torch.testing.assert_close(compiled(x), layer(x))
        sizes.append(len(graphs))
    assert sizes[0] == sizes[1], "full precision"
    assert sizes[3] == sizes[5], "mixed"  # at the second, a router has counted something
    assert sizes[6] == sizes[7], "binary"


@pytest.mark.parametrize("scale", ["column", "row", "tensor"])
def test_scales_start_anew_from_another_weight(scale: str) -> None:
    layer = BinaryLinear(K, N, scale=scale)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(5))
    alpha, beta = init_scales(weight, scale, True, 0)
    found = layer.start_scales(weight)
    assert found.keys() == {"alpha", "beta"}
    assert torch.equal(found["alpha"], alpha)
    assert beta is not None
    assert torch.equal(found["beta"], beta)


def test_vectors_of_scales_start_anew_and_the_rest_has_none() -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(5))
    scale_in, scale_out = rank_one(weight)
    assert torch.equal(make("onebit").start_scales(weight)["scale_in"], scale_in)
    mixture = make("mixture_of_scales").start_scales(weight)
    assert mixture.keys() == {"scale_in", "scale_out"}
    assert torch.equal(mixture["scale_out"], scale_out.expand(4, N))
    for kind in ("bnn", "xnor", "bitnet", "ternary"):
        assert make(kind).start_scales(weight) == {}


@each_layer
def test_start_scales_are_those_of_a_new_layer(kind: str) -> None:
    layer = make(kind)
    for name, values in layer.start_scales(layer.weight.detach()).items():
        assert torch.equal(layer.get_parameter(name), values), name


def test_a_share_outside_0_to_1_is_refused() -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="does not lie in 0 to 1"):
            make("binary", share)


def shares(steps: range, **phases: int) -> list[float]:
    return [binary_share(BinarizeConfig(**phases), step) for step in steps]


def test_the_share_is_a_function_of_the_step() -> None:
    assert shares(range(5)) == [1] * 5
    assert shares(range(5), from_step=2) == [0, 0, 0, 1, 1]
    assert shares(range(8), from_step=2, anneal_steps=3) == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert shares(range(4), anneal_steps=1) == [1, 0.5, 1, 1]  # what is evaluated before the first step is binary
    assert binary_share(BinarizeConfig(enabled=False, from_step=2), 9) == 0
    assert first_binary_step(BinarizeConfig(from_step=2, anneal_steps=3)) == 6


def test_scales_begin_once_where_full_precision_ends() -> None:
    assert [scales_begin(BinarizeConfig(from_step=2, anneal_steps=3), done) for done in range(5)] == [
        *(False, False, True, False, False)
    ]
    for without in (BinarizeConfig(), BinarizeConfig(anneal_steps=3), BinarizeConfig(enabled=False, from_step=2)):
        assert not any(scales_begin(without, done) for done in range(5))


def test_an_unfinished_phase_in_words() -> None:
    how = BinarizeConfig(from_step=2, anneal_steps=2)
    assert unfinished_phase(how, 2) == "in full precision after step 2, binary from step 5 on"
    assert unfinished_phase(how, 3) == "mixed with a binary share of 33.3% after step 3, binary from step 5 on"
    assert unfinished_phase(how, 5) == ""
    assert unfinished_phase(BinarizeConfig(), 0) == ""
    assert unfinished_phase(BinarizeConfig(enabled=False), 3) == ""


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({}, []),
        ({"from_step": 4, "anneal_steps": 6}, []),
        ({"from_step": 10}, []),
        ({"from_step": -1}, ["binarize.from_step=-1 must not be negative"]),
        (
            {"from_step": -1, "anneal_steps": 11},
            ["binarize.from_step=-1 must not be negative", "binarize.anneal_steps=11 end after train.total_steps=10"],
        ),
        ({"from_step": 5, "anneal_steps": 6}, ["binarize.from_step=5 and binarize.anneal_steps=6 end after"]),
        ({"from_step": 5, "enabled": False}, ["binarize.from_step=5 need binarize.enabled=true"]),
        ({"anneal_steps": 5, "method": "cherry"}, ["cannot be had with binarize.method=cherry"]),
        ({"from_step": 5, "method": "partial"}, ["cannot be had with binarize.method=partial"]),
    ],
)
def test_impossible_phases(changes: dict[str, object], sentences: list[str]) -> None:
    found = list(phase_problems(BinarizeConfig(**changes), 10))  # type: ignore[arg-type]
    assert len(found) == len(sentences), found
    for problem, sentence in zip(found, sentences, strict=True):
        assert sentence in problem
