"""Packed layers of every method: what a release stores of a trained layer, and what computes from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fbitrain.model import remote_layers
from fbitrain.model.config import BinarizeConfig, SalientConfig
from fbitrain.model.latent import LatentLinear
from fbitrain.model.method_table import METHODS
from fbitrain.model.methods import FullLinear, make_layer
from fbitrain.model.packed_layers import LAYERS, PackedPartialLinear
from fbitrain.model.packing import StoredLayer, pack_layer
from fbitrain.model.remote_code import BinaryModel
from fbitrain.model.storage import storage_bits

N, K, G = 40, 96, 32
CASES = [BinarizeConfig(method=method) for method, traits in METHODS.items() if not traits.salient]
CASES += [
    BinarizeConfig(method="partial", scale=scale, beta=False, group_size=G, salient=SalientConfig(dtype=dtype))
    for scale in ("row", "group")
    for dtype in ("int8", "float16")
]
CASES += [BinarizeConfig(method="onebit", output_norm=True), BinarizeConfig(method="xnor", variant="benchmark")]
CASES += [
    BinarizeConfig(
        method="cherry",
        scale=scale,
        beta=False,
        group_size=G,
        bits=bits,
        grid=grid,
        salient=SalientConfig(dtype="float16"),
    )
    for scale, bits, grid in (
        *(("row", 1, "normal"), ("group", 1, "normal"), ("row", 2, "normal"), ("group", 3, "normal")),
        *(("row", 4, "normal"), ("group", 3, "minmax")),
    )
]


def name_of(case: BinarizeConfig) -> str:
    return f"{case.method}-{case.scale}-{case.salient.dtype}-{case.bits}-{case.grid}-{case.variant}-{case.output_norm}"


def trained(case: BinarizeConfig, share: float = 0.3) -> LatentLinear:
    """A layer after training: no parameter is where it started. Of the mask's rows one is full and one empty."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(N, K, generator=generator) < share
    mask[0], mask[1] = True, False
    torch.manual_seed(1)
    layer = make_layer(FullLinear.of(nn.Linear(K, N)), case, mask, 0.0).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return layer


def pack(case: BinarizeConfig, layer: LatentLinear, dtype: torch.dtype = torch.float16) -> StoredLayer:
    return pack_layer(case, {name: t for name, t in layer.state_dict().items() if name != "bias"}, dtype)


def build(packed: StoredLayer, bias: Tensor, ours: bool = True) -> remote_layers.PackedWeight:
    layer_class = (LAYERS if ours else BinaryModel.layers)[packed.kind]
    layer = layer_class(K, N, bias=True, **packed.options, **packed.own_options)
    layer.load_state_dict({**packed.tensors, "bias": bias})
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("case", "share"),
    [(case, share) for case in CASES for share in ((0.3, 0.005) if case.traits.salient else (0.3,))],
    ids=lambda value: name_of(value) if isinstance(value, BinarizeConfig) else "csr" if value == 0.005 else "mask",
)
@torch.no_grad()
def test_packed_layers_compute_what_was_trained(case: BinarizeConfig, share: float) -> None:
    layer, x = trained(case, share), inputs(3, 5)
    wanted = layer(x)
    assert wanted.std() > 0.3
    exact, rounded = (pack(case, layer, dtype) for dtype in (torch.float32, torch.float16))
    if case.traits.salient:
        assert exact.own_options["places"] == ("mask" if share == 0.3 else "csr")
    for ours in (True, False):
        torch.testing.assert_close(build(exact, layer.bias, ours)(x), wanted, rtol=1e-5, atol=2e-6)
    ours, plain = (build(rounded, layer.bias, ours)(x) for ours in (True, False))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_stored_tensors_take_the_bits_that_are_counted(case: BinarizeConfig) -> None:
    for share in (0.3, 0.005):
        layer = trained(case, share)
        stored = sum(tensor.nbytes for tensor in pack(case, layer).tensors.values())
        assert 8 * stored == sum(storage_bits(case, N, K, getattr(layer, "n_salient", None)).values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_dense_weight_is_the_effective_weight(case: BinarizeConfig) -> None:
    layer = trained(case)
    packed = pack(case, layer, torch.float32)
    if not case.has_fixed_weights:
        with pytest.raises(ValueError, match="depends on the token"):
            packed.weight(K, N)
    else:
        torch.testing.assert_close(packed.weight(K, N), layer.effective_weight(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@torch.no_grad()
def test_weights_unpack_across_row_blocks(case: BinarizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = trained(case, 0.005)
    plain, x = build(pack(case, layer), layer.bias, ours=False), inputs(4)
    wanted = plain(x)
    monkeypatch.setattr(remote_layers, "BLOCK_WEIGHTS", 7 * K)  # seven rows at a time, 40 is no multiple
    assert len(list(plain.row_blocks())) == 6
    torch.testing.assert_close(plain(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=name_of)
@torch.no_grad()
def test_activations_of_any_dtype(case: BinarizeConfig, dtype: torch.dtype) -> None:
    layer, x = trained(case, 0.005), inputs(2, 3)
    packed = pack(case, layer)
    for ours in (True, False):
        y = build(packed, layer.bias, ours)(x.to(dtype))
        assert y.dtype == dtype
        wanted = layer(x)
        assert (y.float() - wanted).square().mean() < 1e-3 * wanted.square().mean()


def test_ternary_keeps_its_zeros() -> None:
    layer = trained(BinarizeConfig(method="ternary"))
    with torch.no_grad():
        layer.weight[3:9] = 0
    packed = pack(BinarizeConfig(method="ternary"), layer)
    weight, gamma = packed.weight(K, N), packed.tensors["alpha"].item()
    assert weight.unique().tolist() == [-gamma, 0, gamma]
    assert not weight[3:9].any()


@torch.no_grad()
def test_new_salient_weights_take_effect() -> None:
    case = next(case for case in CASES if case.method == "partial")
    first, second = trained(case, 0.3), trained(case, 0.2)
    layer, x = build(pack(case, first), first.bias), inputs(4)
    assert isinstance(layer, PackedPartialLinear)
    before = layer(x)
    packed = pack(case, second)
    layer.salient_values = torch.zeros_like(packed.tensors["salient_values"])
    layer.load_state_dict({**packed.tensors, "bias": second.bias})
    assert not torch.equal(layer(x), before)
    torch.testing.assert_close(layer(x), build(packed, second.bias)(x))
