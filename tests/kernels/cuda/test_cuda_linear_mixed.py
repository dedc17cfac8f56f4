"""mixture_linear and partial_linear on CUDA, run on the CPU from the GPU sources, against their formulas in fp64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cuda_linear, reference
from fbitrain.kernels.layout import scale_shape
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight
from tests.kernels.cuda.conftest import MakeDevice
from tests.kernels.cuda.test_cuda_linear import CAPABILITIES, DTYPES, devices, rounded_to_words, signal_to_noise
from tests.kernels.cuda_on_cpu.host_device import ORDERS

SHAPES = [(1, 1, 1), (1, 67, 1024), (3, 17, 511), (9, 33, 545), (20, 5, 63), (34, 67, 100)]


def quantized(z: Tensor) -> Tensor:
    """What mode int8 makes of activations, as fp64."""
    q, scale = reference.quantize_int8(z)
    return q.double() * scale.double()


class Mixture(NamedTuple):
    x: Tensor
    words: Tensor
    gates: Tensor
    alpha_in: Tensor
    alpha_out: Tensor

    def weight(self, k: int) -> MixtureWeight:
        return MixtureWeight(*self[1:], k)


def mixture(m: int, n: int, k: int, experts: int) -> Mixture:
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    words = reference.pack_signs(torch.randn(n, k, generator=generator))
    x, gates = torch.randn(m, k, generator=generator), torch.randn(m, experts, generator=generator).softmax(-1)
    alpha_in, alpha_out = (torch.rand(experts, width, generator=generator) + 0.5 for width in (k, n))
    return Mixture(x, words, gates, alpha_in, alpha_out)


def mixed(gates: Tensor, alpha: Tensor) -> Tensor:
    """gates · alpha, experts added in their order in fp32."""
    total = gates[:, :1] * alpha[0]
    for expert in range(1, len(alpha)):
        total = total + gates[:, expert : expert + 1] * alpha[expert]
    return total


def mixture_formula(call: Mixture, k: int, mode: str) -> Tensor:
    dtype = call.x.dtype
    alpha_in, alpha_out = call.alpha_in.to(dtype).float(), call.alpha_out.to(dtype).float()
    z = call.x.float() * mixed(call.gates, alpha_in)
    z = quantized(z) if mode == "int8" else z.double()
    return (z @ reference.unpack_signs(call.words, k, torch.float64).T) * mixed(call.gates, alpha_out).double()


@pytest.mark.parametrize("mode", ["float", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [1, 4, 64])
def test_mixture_linear_is_near_fp64(host_device: MakeDevice, experts: int, dtype: torch.dtype, mode: str) -> None:
    for i, (m, n, k) in enumerate(SHAPES):
        call = mixture(m, n, k, experts)
        call = call._replace(x=call.x.to(dtype), alpha_in=call.alpha_in.double())  # scales of any dtype
        for device in devices(host_device, i)[: 2 if mode == "int8" else 1]:
            got = cuda_linear.mixture_linear(device, call.x, call.weight(k), mode)
            assert got.dtype == dtype
            assert signal_to_noise(mixture_formula(call, k, mode), got) > DTYPES[dtype], (m, n, k, device.launched)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_mixture_linear_quantizes_to_the_bit(host_device: MakeDevice, capability: int) -> None:
    """Seen through a weight that is one column's sign: 2·q of the others cancels, only that column's q remains."""
    k, call = 96, mixture(5, 96, 96, 3)
    words = reference.pack_signs(2 * torch.eye(k) - 1)
    q, scale = reference.quantize_int8(call.x * mixed(call.gates, call.alpha_in))
    call = call._replace(words=words, alpha_out=torch.ones(3, k), gates=call.gates)
    got = cuda_linear.mixture_linear(host_device(capability), call.x, call.weight(k), "int8")
    wanted = (2 * q.double() - q.double().sum(1, keepdim=True)) * scale.double()
    total = mixed(call.gates, call.alpha_out).double()
    assert torch.equal((got.double() / scale / total).round(), (wanted / scale).round())


def test_mixture_scales_are_rounded_after_each_operation(host_device: MakeDevice) -> None:
    """A weight of one sign shows the scales themselves; a fused multiply-add would change their last bits."""
    call = mixture(40, 1, 1, 5)
    z = call.x * mixed(call.gates, call.alpha_in)
    wanted = (z.sign() * 127 * (z.abs() / 127)) * mixed(call.gates, call.alpha_out)
    call = call._replace(words=torch.ones(1, 1, dtype=torch.int32))
    assert torch.equal(cuda_linear.mixture_linear(host_device(), call.x, call.weight(1), "int8"), wanted)


def test_mixture_linear_keeps_leading_shapes(host_device: MakeDevice) -> None:
    call = mixture(6, 7, 40, 2)
    flat = cuda_linear.mixture_linear(host_device(), call.x, call.weight(40))
    gates = call.gates.T.contiguous().T.reshape(2, 3, 2)
    weight = call._replace(gates=gates).weight(40)
    got = cuda_linear.mixture_linear(host_device(), call.x.reshape(2, 3, 40), weight)
    assert torch.equal(got, flat.reshape(2, 3, 7))


class Partial(NamedTuple):
    x: Tensor
    words: Tensor
    alpha: Tensor
    scale: str
    row_starts: Tensor
    columns: Tensor
    values: Tensor
    value_scale: Tensor | None

    def weight(self, k: int, group_size: int = 0) -> PartialWeight:
        return PartialWeight(*self[1:], k, group_size)


def partial(
    m: int,
    n: int,
    k: int,
    scale: str,
    values: torch.dtype,
    fraction: float = 0.2,
    column_dtype: torch.dtype = torch.uint16,
) -> Partial:
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    mask = torch.rand(n, k, generator=generator) < fraction
    mask[n // 2] = False  # a row without salient weights
    mask[-1] = True  # and one of nothing else
    rows, columns = mask.nonzero(as_tuple=True)
    row_starts = torch.zeros(n + 1, dtype=torch.int32)
    row_starts[1:] = torch.bincount(rows, minlength=n).cumsum(0)
    x, words = torch.randn(m, k, generator=generator), reference.pack_signs(torch.randn(n, k, generator=generator))
    alpha = torch.rand(scale_shape(scale, n, k, 32), generator=generator) + 0.5
    if values == torch.int8:
        entries = torch.randint(-127, 128, columns.shape, generator=generator).to(torch.int8)
        return Partial(x, words, alpha, scale, row_starts, columns.to(column_dtype), entries, torch.rand(n, 1) * 0.1)
    entries = torch.randn(columns.shape, generator=generator).half() * 3
    return Partial(x, words, alpha, scale, row_starts, columns.to(column_dtype), entries, None)


def partial_formula(call: Partial, k: int, mode: str) -> Tensor:
    n, dtype = len(call.words), call.x.dtype
    weight = torch.unflatten(reference.unpack_signs(call.words, k, torch.float64), 1, (call.alpha.shape[1], -1))
    weight = (weight * call.alpha.to(dtype).double()[:, :, None]).flatten(1)
    rows = torch.repeat_interleave(torch.arange(n), call.row_starts.diff().long())
    scale = torch.ones(n, 1) if call.value_scale is None else call.value_scale
    weight[rows, call.columns.long()] = call.values.double() * scale.double()[rows, 0]
    return (quantized(call.x) if mode == "int8" else call.x.double()) @ weight.T


@pytest.mark.parametrize("mode", ["float", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", [torch.int8, torch.float16])
@pytest.mark.parametrize("scale", ["row", "group"])
def test_partial_linear_is_near_fp64(
    host_device: MakeDevice, scale: str, values: torch.dtype, dtype: torch.dtype, mode: str
) -> None:
    for i, (m, n, k) in enumerate(SHAPES):
        k = rounded_to_words(k) if scale == "group" else k
        call = partial(m, n, k, scale, values, column_dtype=torch.int32 if i % 2 else torch.uint16)
        call = call._replace(x=call.x.to(dtype))
        device = devices(host_device, i)[0]
        got = cuda_linear.partial_linear(device, call.x, call.weight(k, 32), mode)
        assert got.dtype == dtype
        assert signal_to_noise(partial_formula(call, k, mode), got) > DTYPES[dtype], (m, n, k, device.launched)


def test_partial_linear_sums_integers_exactly(host_device: MakeDevice) -> None:
    """Sums of int8 values times int8 activations beyond 2^31, where int32 would wrap around."""
    k = 140_000
    call = partial(1, 1, k, "row", torch.int8, column_dtype=torch.int32)
    x = torch.full((1, k), 127.0)
    x[0, 1] = -126
    values = torch.full_like(call.values, 127)
    call = call._replace(x=x, alpha=torch.zeros(1, 1), values=values, value_scale=torch.ones(1, 1))
    got = cuda_linear.partial_linear(host_device(), call.x, call.weight(k), "int8")
    assert got.item() > 2**31
    assert torch.equal(got, partial_formula(call, k, "float").float())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", ["float", "int8"])
def test_the_order_of_threads_does_not_matter(host_device: MakeDevice, mode: str, order: int) -> None:
    for dtype, m in itertools.product(DTYPES, (1, 10)):
        call = partial(m, 19, 1120, "row", torch.int8)
        call = call._replace(x=call.x.to(dtype))
        wanted = cuda_linear.partial_linear(host_device(80, 0), call.x, call.weight(1120), mode)
        assert torch.equal(
            cuda_linear.partial_linear(host_device(80, order, None), call.x, call.weight(1120), mode), wanted
        )


def test_partial_linear_without_salient_weights(host_device: MakeDevice) -> None:
    call = partial(3, 4, 70, "row", torch.int8)
    nothing = {"row_starts": torch.zeros(5, dtype=torch.int32), "columns": call.columns[:0], "values": call.values[:0]}
    call = call._replace(**nothing)
    got = cuda_linear.partial_linear(host_device(), call.x, call.weight(70))
    wanted = reference.binary_linear(call.x, BinaryWeight(call.words, call.alpha, None, "row", 70, 0))
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "i", "value", "problem"),
    [
        ("row_starts", 0, 1, "row_starts must ascend from 0"),
        ("row_starts", 4, 7, "row_starts must ascend from 0"),
        ("row_starts", 1, 50, "row_starts must ascend from 0"),
        ("columns", 0, 40, "must ascend, from 0 to 39"),
        ("columns", -1, 0, "must ascend, from 0 to 39"),
    ],
)
def test_partial_linear_refuses_entries_that_are_no_rows(
    host_device: MakeDevice, name: str, i: int, value: int, problem: str
) -> None:
    """Also in tensors that were good and have been changed since."""
    call = partial(2, 4, 40, "row", torch.int8, column_dtype=torch.int32)
    cuda_linear.partial_linear(host_device(), call.x, call.weight(40))
    getattr(call, name)[i] = value
    with pytest.raises(ValueError, match=problem):
        cuda_linear.partial_linear(host_device(), call.x, call.weight(40))


def test_salient_entries_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at them waits for the GPU. Other contents of the same tensors, and other tensors, are looked at again."""
    looked_at: list[Tensor] = []
    monkeypatch.setattr(cuda_linear, "salient_places", lambda row_starts, columns, k: looked_at.append(columns))
    row_starts, columns = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([3, 5], dtype=torch.int32)

    def looks() -> int:
        before = len(looked_at)
        cuda_linear._check_salient(row_starts, columns, 40)
        return len(looked_at) - before

    assert [looks(), looks()] == [1, 0]
    columns[0] = 4
    assert [looks(), looks()] == [1, 0]
    columns.data = columns.clone()  # which leaves the count of changes as it is
    assert [looks(), looks()] == [1, 0]
    row_starts = row_starts.clone()
    assert [looks(), looks()] == [1, 0]


def test_row_starts_where_others_were_are_looked_at() -> None:
    """Python gives a new tensor the id of one that is gone."""
    columns = torch.tensor([3, 5], dtype=torch.int32)
    for _ in range(50):
        cuda_linear._check_salient(torch.tensor([0, 2], dtype=torch.int32), columns, 40)
        with pytest.raises(ValueError, match="row_starts must ascend from 0"):
            cuda_linear._check_salient(torch.tensor([0, 9], dtype=torch.int32), columns, 40)


@pytest.mark.parametrize("changed", ["row_starts", "columns"])
def test_changes_that_are_not_counted_are_found(changed: str) -> None:
    tensors = {"row_starts": torch.tensor([0, 2]), "columns": torch.tensor([3, 5])}
    with torch.inference_mode():
        tensors[changed] = tensors[changed].clone()
        cuda_linear._check_salient(**tensors, k=40)
        tensors[changed][1] = 90
        with pytest.raises(ValueError, match="must ascend"):
            cuda_linear._check_salient(**tensors, k=40)
