"""BinaryLinear against a plain formulation of ŵ = α·sign(W) + β, what it saves, and where it has to work."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fbitrain.kernels import reference
from fbitrain.model import scaled_product
from fbitrain.model.linear import BinaryLinear
from fbitrain.model.packed_layers import PackedBinaryLinear
from tests.model.packing import packed_form

N, K, G = 7, 33, 11
PATTERNS = [*product(("column", "row", "tensor"), (True, False)), ("group", False)]


def make_layer(scale: str, beta: bool, ste: str = "identity", dtype: torch.dtype = torch.float64) -> BinaryLinear:
    """A layer with |w| on both sides of 1, some exact zeros, and scales that are not at their start values."""
    torch.manual_seed(0)
    layer = BinaryLinear(K, N, scale=scale, beta=beta, group_size=G, ste=ste, init_std=1.0, dtype=dtype)
    with torch.no_grad():
        layer.weight[0, :3] = torch.tensor([0.0, -0.0, 1.0])
        layer.alpha.add_(torch.randn_like(layer.alpha))
        if layer.beta is not None:
            layer.beta.add_(torch.randn_like(layer.beta))
    return layer


def make_input(*leading: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*leading, K, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def plain_forward(layer: BinaryLinear, x: Tensor) -> Tensor:
    """The definition, with the float matrix ŵ and autograd; the estimator as w - w.detach()."""
    w = layer.weight
    through = w if layer.ste == "identity" else torch.where(w.detach().abs() <= 1, w, w.detach())
    signs = torch.where(w.detach() >= 0, 1.0, -1.0).to(w.dtype) + through - through.detach()
    alpha = layer.alpha.repeat_interleave(G, dim=1) if layer.scale == "group" else layer.alpha
    effective = alpha * signs if layer.beta is None else alpha * signs + layer.beta
    return F.linear(x, effective.to(x.dtype))


def gradients(layer: BinaryLinear, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    named = {"x": x, **dict(layer.named_parameters())}
    return dict(zip(named, torch.autograd.grad(y, list(named.values()), dy), strict=True))


@pytest.mark.parametrize("block_weights", [1, 40, 2**22])
@pytest.mark.parametrize("ste", ["identity", "clip"])
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_forward_and_gradients(
    scale: str, beta: bool, ste: str, block_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_product, "BLOCK_WEIGHTS", block_weights)
    layer, x = make_layer(scale, beta, ste), make_input(2, 3)
    y, wanted = layer(x), plain_forward(layer, x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(gradients(layer, x, y), gradients(layer, x, wanted))


@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_gradients_of_input_and_scales_by_finite_differences(scale: str, beta: bool) -> None:
    layer, x = make_layer(scale, beta), make_input(4)
    layer.weight.requires_grad_(False)
    names = [name for name, _ in layer.named_parameters() if name != "weight"]

    def compute(x: Tensor, *scales: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, dict(zip(names, scales, strict=True)), (x,))
        return y

    assert torch.autograd.gradcheck(compute, (x, *(layer.get_parameter(name) for name in names)))


@pytest.mark.parametrize(
    ("scale", "beta", "wanted"),
    [
        (*pattern, name)
        for pattern in PATTERNS
        for name in ("x", "weight", "alpha", "beta")
        if pattern[1] or name != "beta"
    ],
)
def test_one_gradient_alone(scale: str, beta: bool, wanted: str) -> None:
    layer, x = make_layer(scale, beta), make_input(5)
    named = {"x": x, **dict(layer.named_parameters())}
    expected = gradients(layer, x, layer(x))[wanted]
    for name, tensor in named.items():
        tensor.requires_grad_(name == wanted)
    y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(dy)
    assert {name for name, tensor in named.items() if tensor.grad is not None} == {wanted}
    torch.testing.assert_close(named[wanted].grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_saves_nothing_but_input_and_parameters(scale: str, beta: bool) -> None:
    layer, x = make_layer(scale, beta), make_input(2, 3)
    strided = x.transpose(0, 1)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(strided)
    allowed = {x.data_ptr(), *(parameter.data_ptr() for parameter in layer.parameters())}
    assert {tensor.data_ptr() for tensor in saved} == allowed


class FloatMatrices(TorchDispatchMode):
    """Collects every value that a float tensor of N·K elements takes while ops run."""

    def __init__(self) -> None:
        super().__init__()
        self.magnitudes: set[float] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and result.numel() == N * K:
            self.magnitudes.update(result.flatten().abs().tolist())
        return result


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_the_scaled_weight_never_exists(scale: str, beta: bool, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the [N, K] floats of a forward and backward pass there is W and ±1 on its way there, never α·S + β."""
    monkeypatch.setattr(scaled_product, "BLOCK_WEIGHTS", 2 * N * G)
    monkeypatch.setattr(reference, "BLOCK_WEIGHTS", 2 * K)
    layer, x = make_layer(scale, beta), make_input(4)
    run = packed_form(layer) if packed else layer
    layer.requires_grad_(False)
    with FloatMatrices() as seen:
        y = run(x)
        if not packed:
            y.sum().backward()
    assert seen.magnitudes <= {0.0, 1.0, 2.0, *layer.weight.abs().flatten().tolist()}


@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_compiles_whole(scale: str, beta: bool) -> None:
    torch.compiler.reset()  # all layers share one forward, whose variants torch counts
    layer, x = make_layer(scale, beta), make_input(2, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(gradients(layer, x, compiled(x)), gradients(layer, x, layer(x)))


def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    layer, x = make_layer("column", True, dtype=torch.float32), make_input(5, dtype=torch.float32)
    with torch.no_grad():
        layer.weight[1, :4] = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(gradients(layer, x, compiled(x)), gradients(layer, x, layer(x)))


@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_activation_checkpointing(scale: str, beta: bool) -> None:
    layer, x = make_layer(scale, beta), make_input(2, 3)
    y = checkpoint(layer, x, use_reentrant=False)
    torch.testing.assert_close(gradients(layer, x, y), gradients(layer, x, layer(x)), rtol=0, atol=0)


@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_parameters_may_be_away_between_forward_and_backward(scale: str, beta: bool) -> None:
    """What ZeRO-3 does: it empties parameters after forward and puts their values into new memory for backward."""
    layer, x = make_layer(scale, beta), make_input(2, 3)
    wanted = gradients(layer, x, layer(x))
    y = layer(x)
    for parameter in layer.parameters():
        values = parameter.data
        parameter.data = torch.empty(0, dtype=values.dtype)
        parameter.data = values.clone()
        values.zero_()
    torch.testing.assert_close(gradients(layer, x, y), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_empty_and_strided_input(scale: str, beta: bool) -> None:
    layer, x = make_layer(scale, beta), make_input(0)
    y = layer(x)
    assert y.shape == (0, N)
    assert all((gradient == 0).all() for gradient in gradients(layer, x, y).values())
    x = make_input(3, 2)
    assert layer(x[0, 0]).shape == (N,)
    torch.testing.assert_close(layer(x.transpose(0, 1)), layer(x).transpose(0, 1))
    torch.testing.assert_close(layer(x[:1].expand(4, 2, K)), layer(x[:1].repeat(4, 1, 1)))
    y = layer(x)
    (dx,) = torch.autograd.grad(y.sum(), x)  # an expanded gradient, all strides 0
    torch.testing.assert_close(dx, torch.autograd.grad(y := layer(x), x, torch.ones_like(y))[0])


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_bf16_input(scale: str, beta: bool, parameter_dtype: torch.dtype) -> None:
    layer = make_layer(scale, beta, dtype=torch.float32)
    layer.to(parameter_dtype)
    exact = make_layer(scale, beta)
    exact.load_state_dict(layer.state_dict())
    x = make_input(6, dtype=torch.bfloat16)
    y, wanted = layer(x), exact(exact_x := x.detach().double().requires_grad_())
    assert y.dtype == torch.bfloat16
    assert (y.double() - wanted).norm() < 0.01 * wanted.norm()
    found, wanted_gradients = gradients(layer, x, y), gradients(exact, exact_x, wanted.bfloat16().double())
    for name, gradient in found.items():
        assert gradient.dtype == (torch.bfloat16 if name == "x" else parameter_dtype)
        error = (gradient.double() - wanted_gradients[name]).norm()
        assert error < 0.02 * wanted_gradients[name].norm(), name


def test_in_bf16_the_output_is_as_exact_as_the_published_layers() -> None:
    """FBI-LLM's layer under autocast rounds ŵ = α·sign(W) + β once, to bf16, and multiplies: so the paper's equation,
    written out here. Ours never builds ŵ, and rounds x·α instead.
    """
    torch.manual_seed(0)
    layer, x = BinaryLinear(768, 512, weight=torch.randn(512, 768) * 0.02), torch.randn(256, 768).bfloat16()
    with torch.no_grad():
        layer.alpha.mul_(1 + 0.3 * torch.randn_like(layer.alpha))
    effective = layer.alpha.detach() * torch.where(layer.weight.detach() < 0, -1.0, 1.0) + layer.beta.detach()
    exact = x.double() @ effective.double().T

    def error(y: Tensor) -> float:
        return float((y.detach().double() - exact).norm() / exact.norm())

    assert error(layer(x)) < 1.2 * error(x @ effective.bfloat16().T)


def test_a_weight_too_small_for_the_input_dtype_keeps_its_sign() -> None:
    layer = BinaryLinear(1, 1, beta=False, weight=torch.tensor([[-1e-30]]))
    with torch.no_grad():
        layer.alpha.fill_(1.0)
    assert layer(torch.ones(1, 1, dtype=torch.float16)).item() == -1.0


def test_scale_gradients_are_summed_in_fp32() -> None:
    """257 is no bf16 number: a sum kept in bf16 would give 256 or 258."""
    layer = BinaryLinear(1, 1, weight=torch.ones(1, 1))
    layer(torch.ones(257, 1, dtype=torch.bfloat16)).sum().backward()
    assert layer.beta is not None
    assert layer.alpha.grad is not None
    assert layer.beta.grad is not None
    assert (layer.alpha.grad.item(), layer.beta.grad.item()) == (257.0, 257.0)


def test_second_derivative_is_refused() -> None:
    layer, x = make_layer("column", True), make_input(2)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_start_values() -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
    layer = BinaryLinear(K, N, scale="row", beta=True, weight=weight)
    assert torch.equal(layer.weight, weight)
    assert layer.weight.data_ptr() != weight.data_ptr()
    assert layer.beta is not None
    assert torch.equal(layer.beta, weight.mean(1, keepdim=True))
    with torch.no_grad():
        layer.weight.mul_(2)
    layer.reset_scales()
    assert torch.equal(layer.beta, 2 * weight.mean(1, keepdim=True))
    torch.manual_seed(4)
    assert BinaryLinear(200, 200, init_std=0.5).weight.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("layer_class", [BinaryLinear, PackedBinaryLinear])
def test_impossible_layers_are_refused(layer_class: type[BinaryLinear] | type[PackedBinaryLinear]) -> None:
    with pytest.raises(ValueError, match="no shift"):
        layer_class(8, 8, scale="group", beta=True, group_size=4)
    with pytest.raises(ValueError, match="not a multiple of group_size=128"):
        layer_class(8, 8, scale="group", beta=False)
    with pytest.raises(ValueError, match="'colum' is unknown"):
        layer_class(8, 8, scale="colum")


def test_unknown_ste_is_refused() -> None:
    with pytest.raises(ValueError, match="ste='tanh' is unknown"):
        BinaryLinear(8, 8, ste="tanh")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_packed_equals_unpacked(scale: str, beta: bool, dtype: torch.dtype) -> None:
    layer = make_layer(scale, beta, dtype=torch.float32)
    packed = packed_form(layer)
    assert packed.weight_bits.dtype == torch.int32
    assert packed.weight_bits.shape == (N, 2)
    x = make_input(2, 3, dtype=dtype).detach()
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.1}
    torch.testing.assert_close(packed(x), layer(x).detach(), **tolerance)


@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_packed_state_dict_round_trip(scale: str, beta: bool) -> None:
    packed = packed_form(make_layer(scale, beta, dtype=torch.float32))
    state = packed.state_dict()
    assert set(state) == {"weight_bits", "alpha"} | ({"beta"} if beta else set())
    loaded = PackedBinaryLinear(K, N, scale=scale, beta=beta, group_size=G)
    loaded.load_state_dict(state)
    x = make_input(4, dtype=torch.float32).detach()
    assert torch.equal(loaded(x), packed(x))


def test_packed_scales_do_not_follow_the_layer() -> None:
    layer = make_layer("column", True, dtype=torch.float32)
    packed = packed_form(layer)
    alpha = packed.alpha.clone()
    with torch.no_grad():
        layer.alpha.add_(1)
    assert torch.equal(packed.alpha, alpha)
    assert not packed.alpha.requires_grad
