"""binary_linear on CUDA, run on the CPU from the GPU sources: integers exactly, floats by their signal-to-noise ratio,
in several thread orders, with arrays that end at pages that cannot be touched."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cuda_linear, reference
from fbitrain.kernels.cuda_linear_plan import PRODUCT_TENSORS, PROLOGUE_TENSORS, LinearCall, plan_linear
from fbitrain.kernels.layout import SCALES, scale_shape
from fbitrain.kernels.weights import BinaryWeight
from tests.kernels.cuda.conftest import MakeDevice
from tests.kernels.cuda_on_cpu.host_device import ORDERS, HostDevice
from tests.kernels.cuda_on_cpu.host_module import CudaError

# Tokens, rows and columns around what words, chunks (512), spans (1024), tiles and blocks hold. With K = 1024 and 2048
# rows are aligned to 16 bytes, otherwise not. In this order: decode of one token, of a tile, of several; prefill.
SHAPES = [(1, 1, 1), (1, 67, 1024), (2, 15, 33), (3, 17, 511), (8, 16, 512), (9, 33, 545), (20, 5, 63), (16, 31, 2048)]
PREFILL_SHAPES = [(33, 67, 100), (70, 129, 545)]
DTYPES = {torch.float32: 120.0, torch.bfloat16: 48.0, torch.float16: 65.0}  # and the least signal-to-noise ratio, in dB
CAPABILITIES = (80, 100)  # bit planes on tensor cores, or not
PATTERNS = [
    (scale, beta) for scale, beta in itertools.product(SCALES, (False, True)) if (scale, beta) != ("group", True)
]


def signal_to_noise(wanted: Tensor, got: Tensor) -> float:
    """In dB."""
    noise = (got.double() - wanted.double()).norm()
    return float(20 * torch.log10(wanted.double().norm() / noise.clamp_min(1e-300)))


def inputs(
    m: int, n: int, k: int, scale: str, beta: bool, group_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x, words, α, β. Some α are negative."""
    generator = torch.Generator().manual_seed(m * 7919 + n * 31 + k)
    shape = scale_shape(scale, n, k, group_size)
    words = reference.pack_signs(torch.randn(n, k, generator=generator))
    x, alpha = torch.randn(m, k, generator=generator), torch.rand(shape, generator=generator) + 0.5
    alpha *= torch.where(torch.rand(shape, generator=generator) < 0.2, -1.0, 1.0)
    return x, words, alpha, torch.randn(shape, generator=generator) * 0.1 if beta else None


def devices(host_device: MakeDevice, i: int) -> list[HostDevice]:
    """Every capability; thread orders and alignments take turns with `i`."""
    return [host_device(cap, ORDERS[(i + j) % 4], 16 if (i + j) % 3 else None) for j, cap in enumerate(CAPABILITIES)]


def rounded_to_words(k: int) -> int:
    return -(-k // 32) * 32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_float_mode_is_near_fp64(host_device: MakeDevice, scale: str, beta: bool, dtype: torch.dtype) -> None:
    for i, (m, n, k) in enumerate(SHAPES + PREFILL_SHAPES):
        k = rounded_to_words(k) if scale == "group" else k
        x, words, alpha, b = inputs(m, n, k, scale, beta, 32)
        x, b = x.to(dtype), None if b is None else b.to(dtype).double()
        wanted = reference.binary_linear(x.double(), BinaryWeight(words, alpha.to(dtype).double(), b, scale, k, 32))
        device = devices(host_device, i)[0]  # no float kernel depends on the capability
        got = cuda_linear.binary_linear(device, x, BinaryWeight(words, alpha, b, scale, k, 32))
        assert got.dtype == dtype
        assert signal_to_noise(wanted, got) > DTYPES[dtype], (m, n, k, device.launched)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_int8_mode_is_the_reference(host_device: MakeDevice, scale: str, beta: bool, dtype: torch.dtype) -> None:
    """The same integers; the few roundings after them are in another order."""
    for i, (m, n, k) in enumerate(SHAPES + PREFILL_SHAPES):
        k = rounded_to_words(k) if scale == "group" else k
        x, words, alpha, b = inputs(m, n, k, scale, beta, 32)
        arguments = (x.to(dtype), BinaryWeight(words, alpha, b, scale, k, 32), "int8")
        wanted = reference.binary_linear(*arguments)
        for device in devices(host_device, i):
            got = cuda_linear.binary_linear(device, *arguments)
            assert got.dtype == dtype
            assert signal_to_noise(wanted, got) > DTYPES[dtype], (m, n, k, device.launched)


@pytest.mark.parametrize("scale", ["row", "group"])
@pytest.mark.parametrize("k", [1, 31, 32, 33, 511, 512, 513, 4096])
def test_int8_sums_are_exact(host_device: MakeDevice, k: int, scale: str) -> None:
    """Integers whose largest is 127 are quantized to themselves, and sums below 2^24 are exact in fp32."""
    k = rounded_to_words(k) if scale == "group" else k
    for i, (m, n) in enumerate([(1, 3), (3, 18), (17, 5), (34, 66)]):
        x, words, alpha, _ = inputs(m, n, k, scale, False, 32)
        x = x.mul(40).round().clamp(-127, 127)
        x[:, 0] = 127
        wanted = x @ reference.unpack_signs(words, k, torch.float32).T
        for device in devices(host_device, i):
            got = cuda_linear.binary_linear(
                device, x, BinaryWeight(words, torch.ones_like(alpha), None, scale, k, 32), "int8"
            )
            assert torch.equal(got, wanted), (m, n, device.launched)


@pytest.mark.parametrize("m", [1, 2, 33])
def test_int8_sums_at_their_extremes(host_device: MakeDevice, m: int) -> None:
    k, one = 8192, torch.ones(1, 1)
    words = torch.tensor([[-1] * 256, [0] * 256], dtype=torch.int32)
    for capability, value in itertools.product(CAPABILITIES, (127.0, -127.0)):
        x = torch.full((m, k), value)
        got = cuda_linear.binary_linear(
            host_device(capability), x, BinaryWeight(words, one, None, "tensor", k, 0), "int8"
        )
        assert got.tolist() == [[value * k, -value * k]] * m


@pytest.mark.parametrize("mode", ["float", "int8"])
@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256])
def test_group_sizes(host_device: MakeDevice, group_size: int, mode: str) -> None:
    """One to many groups in a step of 128 columns, and the other way round."""
    for i, (m, dtype) in enumerate(itertools.product((1, 9, 34), DTYPES)):
        k = group_size * 9
        x, words, alpha, _ = inputs(m, 19, k, "group", False, group_size)
        x, weight = x.to(dtype), BinaryWeight(words, alpha.to(dtype), None, "group", k, group_size)
        wide = (x, weight) if mode == "int8" else (x.double(), weight._replace(alpha=weight.alpha.double()))
        wanted = reference.binary_linear(*wide, mode)
        got = cuda_linear.binary_linear(devices(host_device, i)[0], x, weight, mode)
        assert signal_to_noise(wanted, got) > DTYPES[dtype]


@pytest.mark.parametrize("mode", ["float", "int8"])
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_scales_are_rounded_to_the_dtype_of_the_activations(
    host_device: MakeDevice, scale: str, beta: bool, mode: str
) -> None:
    """1 + 2^-8 is 1 in bfloat16; unrounded, it would change a result that starts at 1.5."""
    x = torch.zeros(40, 32)
    x[:, 0] = 1.5
    scales = torch.full(scale_shape(scale, 1, 32, 32), 1 + 2**-8)
    words = torch.ones(1, 1, dtype=torch.int32)
    weight = BinaryWeight(words, scales, scales if beta else None, scale, 32, 32)
    for m in (1, 40):
        for device in devices(host_device, m):
            got = cuda_linear.binary_linear(device, x[:m].bfloat16(), weight, mode)
            assert got.tolist() == [[3.0 if beta else 1.5]] * m, device.launched


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_the_order_of_threads_does_not_matter(host_device: MakeDevice, m: int, order: int) -> None:
    """Not even a bit of it: sums are added in a fixed order."""
    for dtype, mode, scale in itertools.product(DTYPES, ("float", "int8"), ("column", "group")):
        x, words, alpha, _ = inputs(m, 37, 608, scale, False, 32)
        arguments = (x.to(dtype), BinaryWeight(words, alpha, None, scale, 608, 32), mode)
        first, other = host_device(80, 0), host_device(80, order, None)
        wanted = cuda_linear.binary_linear(first, *arguments)
        assert torch.equal(cuda_linear.binary_linear(other, *arguments), wanted), other.launched


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (1, 1, 64), (2, 3, 64)])
def test_leading_shapes_and_strides(host_device: MakeDevice, shape: tuple[int, ...]) -> None:
    _, words, alpha, beta = inputs(1, 10, 64, "column", True, 0)
    x = torch.randn(*shape[:-1], 128, generator=torch.Generator().manual_seed(0))[..., ::2]
    got = cuda_linear.binary_linear(host_device(), x, BinaryWeight(words, alpha, beta, "column", 64, 0))
    wanted = reference.binary_linear(x, BinaryWeight(words, alpha, beta, "column", 64, 0))
    assert got.shape == (*shape[:-1], 10)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_no_rows(host_device: MakeDevice) -> None:
    words, alpha = torch.empty(0, 2, dtype=torch.int32), torch.ones(1, 1)
    y = cuda_linear.binary_linear(host_device(), torch.ones(3, 64), BinaryWeight(words, alpha, None, "tensor", 64, 0))
    assert y.shape == (3, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [2, 40])
def test_float_mode_passes_nan_and_infinity_on(host_device: MakeDevice, m: int, dtype: torch.dtype) -> None:
    x, words, alpha, _ = inputs(m, 4, 40, "row", False, 0)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    y = cuda_linear.binary_linear(host_device(), x.to(dtype), BinaryWeight(words, alpha, None, "row", 40, 0))
    assert y[0].isnan().all()
    assert y[1].isinf().all()
    assert y[2:].isfinite().all()
    if dtype == torch.bfloat16:
        assert (y[0].view(torch.int16) == 0x7FC0).all()  # the NaN of csrc/activations.h


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_int8_refuses_infinite_activations(host_device: MakeDevice, bad: float, m: int, capability: int) -> None:
    x, words, alpha, _ = inputs(m, 4, 40, "row", False, 0)
    x[2, 39] = bad
    arguments = (x, BinaryWeight(words, alpha, None, "row", 40, 0), "int8")
    with pytest.raises(ValueError, match=r"row 2 of \[\d+, 40\]") as wanted:
        reference.binary_linear(*arguments)
    with pytest.raises(ValueError, match="finite") as refusal:
        cuda_linear.binary_linear(host_device(capability), *arguments)
    assert str(refusal.value) == str(wanted.value)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("largest", [0.0, 1e-39, 1.6e-36, 1e36])
def test_int8_of_tiny_and_huge_activations(host_device: MakeDevice, largest: float, capability: int) -> None:
    """A token whose scale is no normal number counts as zeros."""
    x, words, alpha, _ = inputs(2, 5, 70, "tensor", False, 0)
    x[0] = torch.linspace(-1, 1, 70) * largest
    arguments = (x, BinaryWeight(words, alpha, None, "tensor", 70, 0), "int8")
    got, wanted = cuda_linear.binary_linear(host_device(capability), *arguments), reference.binary_linear(*arguments)
    # Denormal results are flushed to 0, as CuPy compiles.
    assert torch.allclose(got[0], wanted[0], rtol=1e-5, atol=1e-37)
    assert torch.allclose(got[1], wanted[1], rtol=1e-5)


def test_the_plan_chooses_by_tokens_dtype_mode_and_capability(host_device: MakeDevice) -> None:
    for m, dtype, mode, scale, capability, kernel in [
        (1, "float32", "float", "row", 90, "fp32_1"),
        (2, "float32", "float", "group", 90, "fp32_4"),
        (32, "bfloat16", "float", "row", 90, "decode_bfloat16"),
        (33, "float16", "float", "group", 90, "prefill_float16"),
        (1, "float32", "int8", "row", 80, "planes_1"),
        (16, "bfloat16", "int8", "column", 90, "planes_8"),
        (17, "bfloat16", "int8", "column", 90, "decode_int8"),
        (1, "bfloat16", "int8", "column", 100, "decode_int8"),
        (1, "bfloat16", "int8", "group", 80, "decode_int8_groups"),
        (33, "float32", "int8", "tensor", 120, "prefill_int8"),
    ]:
        plan = plan_linear(LinearCall(m, 3, 64, dtype, mode, scale, group_size=32), capability)
        assert plan.launches[-1].kernel == kernel


def test_a_plan_refuses_more_rows_than_a_grid_has() -> None:
    with pytest.raises(ValueError, match="2000000 rows"):
        plan_linear(LinearCall(1, 2_000_000, 64, "bfloat16"), 90)


def test_a_word_past_the_weight_would_be_found(host_device: MakeDevice) -> None:
    """The guarded arrays of these tests end where the weight does: a kernel that is told of one row more faults."""
    x, words, alpha, _ = inputs(1, 8, 64, "tensor", False, 0)
    device, call = host_device(80, 0, None), LinearCall(1, 9, 64, "float32", "float", "tensor")
    prologue, product = plan_linear(call, 80).launches
    tensors = dict.fromkeys((*PROLOGUE_TENSORS, *PRODUCT_TENSORS)) | {"x": x, "words": words, "alpha": alpha}
    tensors |= {name: device.empty(array) for name, array in plan_linear(call, 80).arrays.items()}
    device.launch(prologue, tensors)
    with pytest.raises(CudaError, match="fp32_1: illegal memory access"):
        device.launch(product, tensors)
