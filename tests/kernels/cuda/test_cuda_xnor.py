"""xnor_gemm on CUDA, run on the CPU from the GPU sources: exact, in every thread order, around the sizes of the tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cuda_ops, reference
from tests.kernels.cuda.conftest import MakeDevice
from tests.kernels.cuda_on_cpu.host_device import ORDERS

WIDTHS = (1, 31, 32, 33, 63, 65, 511, 513, 1537, 4096)
# Tokens and rows around what a warp, a 16 × 64 tile and a 128 × 128 tile hold.
SHAPES = [(1, 1), (2, 9), (3, 8), (4, 67), (5, 1), (16, 64), (17, 65), (64, 3), (65, 7), (130, 129)]
# What the plan chooses: popcounts, bits on the tensor cores, bytes on the tensor cores.
CAPABILITIES = (75, 80, 100)


def signs(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1).float()


def check(device: object, m: int, n: int, k: int) -> None:
    a, b = signs(m, k, seed=k), signs(n, k, seed=k + 1)
    product = cuda_ops.xnor_gemm(device, reference.pack_signs(a), reference.pack_signs(b), k)
    assert product.dtype == torch.int32
    assert torch.equal(product.float(), a @ b.T)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("k", WIDTHS)
def test_xnor_gemm_is_exact(host_device: MakeDevice, k: int, capability: int) -> None:
    for i, (m, n) in enumerate(SHAPES):
        check(host_device(capability, ORDERS[i % 4], 16 if i % 3 else None), m, n, k)
