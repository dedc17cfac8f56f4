"""PartialBinaryLinear against loops over single weights, written from PB-LLM's and CherryQ's formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fbitrain.model.partial import STEP, PartialBinaryLinear, ordinary_alpha, pack_mask, quantize_salient, unpack_mask

N, K, G = 6, 35, 5


def make_mask() -> Tensor:
    """About a fifth salient; row 1 has no salient weight, row 2 nothing else, row 3 an all-salient group."""
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(1)) < 0.2
    mask[1], mask[2], mask[3, :G] = False, True, True
    return mask


def make_layer(weight: Tensor | None = None, **options: Any) -> PartialBinaryLinear:
    torch.manual_seed(0)
    weight = torch.randn(N, K, dtype=torch.float64) if weight is None else weight
    return PartialBinaryLinear(K, N, mask=make_mask(), group_size=G, weight=weight, dtype=weight.dtype, **options)


def alpha_by_loop(weight: Tensor, mask: Tensor, size: int) -> list[list[float]]:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    return [
        [
            mean([abs(weight[n, k].item()) for k in range(start, start + size) if not mask[n, k]])
            for start in range(0, weight.shape[1], size)
        ]
        for n in range(weight.shape[0])
    ]


def weight_by_loop(weight: Tensor, mask: Tensor, size: int, salient_dtype: str) -> Tensor:
    """Salient weights in 8 bits per row, or fp16; the others ± their row's (group's) mean magnitude."""
    alpha = alpha_by_loop(weight, mask, size)
    effective = torch.zeros_like(weight)
    for n in range(weight.shape[0]):
        largest = max((abs(w.item()) for w in weight[n][mask[n]]), default=0.0)
        for k in range(weight.shape[1]):
            w = weight[n, k].item()
            if not mask[n, k]:
                effective[n, k] = alpha[n][k // size] * (1 if w >= 0 else -1)
            elif salient_dtype == "int8":
                effective[n, k] = round(w / (largest / 127)) * (largest / 127)
            else:
                effective[n, k] = torch.tensor(w).half().double()
    return effective


@pytest.mark.parametrize("salient_dtype", ["int8", "float16"])
@pytest.mark.parametrize(("scale", "size"), [("row", K), ("group", G)])
def test_effective_weight(scale: str, size: int, salient_dtype: str) -> None:
    layer = make_layer(scale=scale, salient_dtype=salient_dtype)
    wanted = weight_by_loop(layer.weight.detach(), make_mask(), size, salient_dtype)
    torch.testing.assert_close(layer.effective_weight(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("ste", ["identity", "clip"])
@pytest.mark.parametrize(("scale", "size"), [("row", K), ("group", G)])
def test_gradient_of_the_weight(scale: str, size: int, ste: str, trained: bool) -> None:
    """Ordinary weights: α·dŵ, nothing from α's own dependence; salient ones: nothing if frozen, dŵ if trained."""
    layer, mask = make_layer(scale=scale, ste=ste, salient_dtype="float16", trained=trained), make_mask()
    x = torch.randn(4, K, dtype=torch.float64)
    dy = torch.randn(4, N, dtype=torch.float64)
    layer(x).backward(dy)
    alpha = torch.tensor(alpha_by_loop(layer.weight.detach(), mask, size)).double().repeat_interleave(size, dim=1)
    passed = torch.ones(N, K) if ste == "identity" else (layer.weight.abs() <= 1)
    effective_gradient = dy.T @ x
    salient_gradient = effective_gradient if trained else torch.zeros(N, K).double()
    wanted = torch.where(mask, salient_gradient, effective_gradient * alpha * passed)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, wanted, rtol=1e-6, atol=1e-9)


def test_the_scale_follows_the_ordinary_weights_alone() -> None:
    layer, mask = make_layer(), make_mask()
    before = layer.effective_weight()
    with torch.no_grad():
        layer.weight[mask] += 100.0  # frozen: the latent value of a salient weight is of no consequence
    assert torch.equal(layer.effective_weight(), before)
    with torch.no_grad():
        layer.weight[~mask] *= 3.0
    after = layer.effective_weight()
    torch.testing.assert_close(after[~mask], 3 * before[~mask])
    assert torch.equal(after[mask], before[mask])


def test_a_row_without_ordinary_or_salient_weights() -> None:
    weight, mask = torch.randn(N, K, dtype=torch.float64), make_mask()
    alpha = ordinary_alpha(weight, mask)
    assert alpha.shape == (N, 1)
    assert alpha[2] == 0
    assert ordinary_alpha(weight, mask, G).shape == (N, K // G)
    assert ordinary_alpha(weight, mask, G)[3, 0] == 0
    codes, scale = quantize_salient(weight, mask)
    assert scale[1] == 0
    assert (codes[1] == 0).all()
    assert make_layer(weight).effective_weight().isfinite().all()


def test_int8_keeps_signs_and_is_within_half_a_step() -> None:
    weight = torch.randn(50, 200, generator=torch.Generator().manual_seed(3)) * 0.02
    mask = weight.abs() > 0.03
    codes, scale = quantize_salient(weight, mask)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    restored = codes * scale
    assert torch.equal(restored[mask].sign(), weight[mask].sign())
    assert ((restored - weight).abs()[mask] <= (scale / 2 * 1.0001).expand_as(weight)[mask]).all()
    assert (codes.abs().amax(1, keepdim=True)[scale > 0] == 127).all()
    assert (codes[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_frozen_values_keep_their_dtype_when_the_module_changes_its(dtype: torch.dtype) -> None:
    """DeepSpeed calls module.bfloat16()."""
    for salient_dtype in ("int8", "float16"):
        layer = make_layer(torch.randn(N, K), salient_dtype=salient_dtype)
        values = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        layer.to(dtype)
        assert layer.weight.dtype == dtype
        for name, buffer in layer.named_buffers():
            assert buffer.dtype == values[name].dtype, name
            assert torch.equal(buffer, values[name]), name


def test_given_salient_values_replace_those_of_the_weight() -> None:
    layer, mask = make_layer(torch.randn(N, K)), make_mask()
    codes = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=torch.Generator().manual_seed(5))
    scale = torch.rand(N, 1, generator=torch.Generator().manual_seed(6))
    before = layer.effective_weight()
    layer.load_salient(codes, scale)
    effective = layer.effective_weight()
    torch.testing.assert_close(effective[mask], (codes * scale)[mask])
    assert torch.equal(effective[~mask], before[~mask])
    other = make_layer(torch.randn(N, K))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.effective_weight(), effective)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 64, 70])
def test_masks_survive_packing(k: int) -> None:
    mask = torch.rand(3, k, generator=torch.Generator().manual_seed(k)) < 0.5
    assert torch.equal(unpack_mask(pack_mask(mask), k), mask)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_several_bits_are_the_nearest_of_uniform_levels(bits: int) -> None:
    layer, mask = make_layer(bits=bits, salient_dtype="float16", trained=True), make_mask()
    effective = layer.effective_weight()
    for n, row in enumerate(layer.weight.detach()):
        ordinary = ~mask[n]
        step = STEP[bits] * row[ordinary].abs().mean().item() if ordinary.any() else 0.0
        levels = [(i + 0.5) * step for i in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]
        for w, found in zip(row[ordinary].tolist(), effective[n][ordinary].tolist(), strict=True):
            assert abs(w - found) == pytest.approx(min(abs(w - level) for level in levels), abs=1e-9)
            assert any(found == pytest.approx(level) for level in levels)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("scale", "size"), [("row", K), ("group", G)])
def test_the_minmax_grid_is_cherryqs(scale: str, size: int, bits: int) -> None:
    """S = max |w| / 2^(b-1), q = clamp(⌊w / S⌋, -2^(b-1), 2^(b-1) - 1), w' = (q + 1/2)·S (arXiv 2404.02837), over the
    weights of a row or group that are not cherries; the gradient passes unchanged.
    """
    layer, mask = make_layer(bits=bits, grid="minmax", scale=scale, salient_dtype="float16", trained=True), make_mask()
    recipe, tensors = layer.recipe()
    effective, half = recipe(*tensors), 2 ** (bits - 1)
    for n in range(N):
        for start in range(0, K, size):
            places = [k for k in range(start, start + size) if not mask[n, k]]
            step = max((abs(layer.weight[n, k].item()) for k in places), default=0.0) / half
            for k in places:
                code = max(-half, min(half - 1, math.floor(layer.weight[n, k].item() / step)))
                assert effective[n, k].item() == pytest.approx((code + 0.5) * step)
    upstream = torch.randn_like(effective)
    (gradient,) = torch.autograd.grad(effective, layer.weight, upstream)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_step_is_the_best_for_normal_weights(bits: int) -> None:
    """Against the error of a coarser and a finer step on the normal distribution's quantiles."""
    w = torch.special.ndtri((torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000)

    def error(step: float) -> float:
        half = 2 ** (bits - 1)
        level = ((w / step).floor().clamp(-half, half - 1) + 0.5) * step
        return (level - w).square().mean().item()

    best = STEP[bits] * w.abs().mean().item()
    assert error(best) < min(error(best * 1.01), error(best * 0.99))


def test_more_bits_are_closer() -> None:
    weight = torch.randn(8, 512, generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(8, 512, dtype=torch.bool)
    errors = []
    for bits in (1, 2, 3, 4):
        options = {"salient_dtype": "float16", "trained": True, "bits": bits}
        layer = PartialBinaryLinear(512, 8, mask=mask, weight=weight, **options)
        errors.append((layer.effective_weight() - weight).square().mean().item())
    # Mean squared errors of the optimal uniform quantizers of a unit normal (Max 1960, table II).
    assert errors == [pytest.approx(wanted, rel=0.1) for wanted in (0.3634, 0.1188, 0.03744, 0.01154)]


def test_trained_salient_weights_are_fp16_in_forward() -> None:
    layer, mask = make_layer(torch.randn(N, K), salient_dtype="float16", trained=True), make_mask()
    assert set(dict(layer.named_buffers())) == {"salient_bits"}
    effective = layer.effective_weight()
    assert torch.equal(effective[mask], layer.weight.detach()[mask].half().float())
    assert not torch.equal(effective[mask], layer.weight.detach()[mask])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "column"}, "scale='column' is no pattern of a partially binary layer; choose row or group"),
        ({"salient_dtype": "int4"}, "salient_dtype='int4' is unknown; choose int8 or float16"),
        ({"trained": True}, "int8 salient weights cannot be trained"),
        ({"bits": 5}, "bits=5 must be from 1 to 4"),
        ({"bits": 0}, "bits=0 must be from 1 to 4"),
    ],
)
def test_impossible_layers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


def test_codes_are_for_int8_only() -> None:
    with pytest.raises(ValueError, match="the salient weights are float16, which has no codes"):
        make_layer(salient_dtype="float16").load_salient(torch.ones(N, K, dtype=torch.int8), torch.ones(N, 1))


def test_wrong_masks_and_groups_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mask must be bool \[6, 35\], not torch.bool \[35, 6\]"):
        PartialBinaryLinear(K, N, mask=make_mask().T)
    with pytest.raises(ValueError, match="mask must be bool"):
        PartialBinaryLinear(K, N, mask=make_mask().float())
    with pytest.raises(ValueError, match="in_features=35 is not a multiple of group_size=8"):
        PartialBinaryLinear(K, N, mask=make_mask(), scale="group", group_size=8)
