"""xnor_gemm on CUDA, run on the CPU from the GPU sources: exact, in every thread order, around the sizes of tiles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cuda_ops, reference
from fbitrain.kernels.cuda_plan import plan_xnor_gemm
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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_order_of_threads_does_not_matter(host_device: MakeDevice, capability: int, order: int) -> None:
    for m, n, k in [(4, 11, 160), (20, 70, 1060), (70, 140, 640)]:
        check(host_device(capability, order), m, n, k)


@pytest.mark.parametrize("m", [4, 20, 70])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_extremes(host_device: MakeDevice, capability: int, m: int) -> None:
    """All bits equal and all bits different."""
    k, device = 4096, host_device(capability)
    ones, minus = torch.full((m, 128), -1, dtype=torch.int32), torch.zeros(3, 128, dtype=torch.int32)
    assert (cuda_ops.xnor_gemm(device, ones, minus, k) == -k).all()
    assert (cuda_ops.xnor_gemm(device, ones, torch.full_like(minus, -1), k) == k).all()


def test_the_plan_chooses_by_tokens_and_capability(host_device: MakeDevice) -> None:
    for m, capability, kernel in [
        (1, 80, "xnor_popc_1"),
        (2, 80, "xnor_popc_2"),
        (4, 80, "xnor_popc_4"),
        (5, 80, "xnor_tile_16x64"),
        (65, 80, "xnor_tile_128x128"),
        (65, 100, "xnor_tile_128x128"),
        (65, 75, "xnor_popc_4"),
    ]:
        device = host_device(capability)
        check(device, m, 3, 64)
        assert device.launched[-1] == kernel


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 40), (4, 0, 40), (3, 4, 0), (20, 4, 0)])
def test_empty_matrices(host_device: MakeDevice, capability: int, m: int, n: int, k: int) -> None:
    check(host_device(capability), m, n, k)


def test_many_groups_of_tokens_share_a_block() -> None:
    """More tokens than a grid has rows of blocks: on GPUs without tensor cores for bits only."""
    (launch,) = plan_xnor_gemm(4 * 65535 + 1, 8, 32, 75).launches
    assert launch.grid == (1, 65535, 1)


@pytest.mark.parametrize(("m", "n"), [(1, 30_000_000), (64, 30_000_000), (30_000_000, 65)])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_matrix_is_too_long_for_a_grid(capability: int, m: int, n: int) -> None:
    """Tens of millions of rows; CUDA's grids hold 2^31 - 1 blocks along x, but only 65535 along y and z."""
    for launch in plan_xnor_gemm(m, n, 32, capability).launches:
        x, y, z = launch.grid
        assert x < 2**31, launch
        assert max(y, z) <= 65535, launch
