"""pack_signs and unpack_signs on CUDA, run on the CPU from the GPU's sources."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cuda_ops, reference
from tests.kernels.cuda.conftest import MakeDevice
from tests.kernels.cuda_on_cpu.host_device import ORDERS

# Around a word, a warp's chunk of 32 words, and several of them.
SHAPES = [(1, 1), (3, 31), (9, 32), (2, 33), (5, 255), (3, 1023), (2, 1024), (17, 1025), (2, 3, 2081)]
# Values whose sign a comparison may get wrong, above all with denormals flushed.
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 6e-8, -6e-8, 1e-40, -1e-40, 1.0, -1.0]


def weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    w.view(-1)[:: max(1, w.numel() // 40)] = 0.0
    return w.to(dtype)


@pytest.mark.parametrize("dtype", cuda_ops.DTYPES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_signs_are_those_of_the_reference(host_device: MakeDevice, dtype: torch.dtype, order: int) -> None:
    device = host_device(order=order, alignment=None if order % 2 else 16)
    for shape in SHAPES:
        w = weights(shape, dtype)
        words = cuda_ops.pack_signs(device, w)
        assert torch.equal(words, reference.pack_signs(w))
        signs = cuda_ops.unpack_signs(device, words, shape[-1], dtype)
        assert signs.dtype == dtype
        assert torch.equal(signs, reference.unpack_signs(words, shape[-1], dtype))
    assert len(device.launched) == 2 * len(SHAPES)


@pytest.mark.parametrize("dtype", cuda_ops.DTYPES, ids=str)
def test_signs_of_special_values(host_device: MakeDevice, dtype: torch.dtype) -> None:
    w = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
    assert torch.equal(cuda_ops.pack_signs(host_device(), w), reference.pack_signs(w))


def test_strided_and_empty_weights(host_device: MakeDevice) -> None:
    w = weights((70, 45), torch.float32).T
    assert torch.equal(cuda_ops.pack_signs(host_device(), w), reference.pack_signs(w))
    for shape in [(0, 5), (3, 0), (0,), (2, 0, 7)]:
        device = host_device()
        words = cuda_ops.pack_signs(device, torch.empty(shape))
        assert words.shape == reference.pack_signs(torch.empty(shape)).shape
        assert cuda_ops.unpack_signs(device, words, shape[-1], torch.float16).shape == shape
        assert not device.launched
