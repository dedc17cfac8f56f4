"""The CPU model of a GPU finds what it is there to find: small kernels, each with one mistake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cuda_on_cpu.guarded import Guarded
from tests.kernels.cuda_on_cpu.host_device import ORDERS
from tests.kernels.cuda_on_cpu.host_module import CudaError, HostModule

KERNELS = r"""
typedef unsigned int u32;
#define KERNEL extern "C" __global__ void

KERNEL reverse(int* data, int with_barrier) {
    __shared__ int tile[64];
    tile[threadIdx.x] = data[threadIdx.x];
    if (with_barrier) __syncthreads();
    data[threadIdx.x] = tile[63 - threadIdx.x];
}
KERNEL reverse_and_overwrite(int* data, int with_barrier) {
    __shared__ int tile[64];
    tile[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    __syncwarp();
    data[threadIdx.x] = tile[63 - threadIdx.x];
    __syncwarp();
    if (with_barrier) __syncthreads();
    tile[threadIdx.x] = -1;  // the other warp may not have read it yet
}
KERNEL reverse_dynamic(int* data, int beyond) {
    int* tile = static_cast<int*>(simt::dynamic_shared());
    tile[threadIdx.x + beyond] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = tile[63 - threadIdx.x];
}
KERNEL read_uninitialised(int* data) {
    __shared__ int tile[64];
    data[threadIdx.x] = tile[threadIdx.x];
    __syncthreads();
    tile[threadIdx.x] = 1;  // the next block must not see it
}
KERNEL two_barriers(int* data) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
KERNEL barrier_without_all(int* data) {
    if (threadIdx.x == 0) return;
    __syncthreads();
}
KERNEL shuffle_without_all(int* data) {
    if (threadIdx.x == 0) return;
    data[threadIdx.x] = __shfl_xor_sync(0xffffffffu, data[threadIdx.x], 1);
}
KERNEL lanes_disagree(int* data) {
    if (threadIdx.x % 2) data[threadIdx.x] = __ballot_sync(0xffffffffu, 1);
    else data[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
}
KERNEL touch(int* data, int index) { data[index] = 7; }
KERNEL static_index(int* data, int index) {
    __shared__ int tile[64];
    tile[index] = 1;
    data[0] = tile[index];
}
KERNEL wide_load(int* data, int offset) {
    int4 four = *reinterpret_cast<int4*>(data + offset);
    data[0] = four.w;
}
KERNEL copy_async(int* data, int wait) {
    __shared__ __align__(16) int tile[4];
    simt::cp_async(tile, data, 16, 12);
    simt::cp_async_commit();
    if (wait) simt::cp_async_wait(0);
    data[0] = tile[0];
    data[3] = tile[3];
}
KERNEL warp_sums(int* data) {
    int value = data[threadIdx.x];
    for (int d = 16; d; d /= 2) value += __shfl_down_sync(0xffffffffu, value, d);
    u32 odd = __ballot_sync(0xffffffffu, data[threadIdx.x] % 2);
    __syncwarp();
    data[threadIdx.x] = threadIdx.x % 32 ? __popc(odd) : value;
}
KERNEL scalars(long long* out, int i, long long l, float f) { out[0] = i; out[1] = l; out[2] = (long long)(2 * f); }
KERNEL flush(float* x) { x[1] = x[0] * 0.5f; }
KERNEL halves(unsigned short* bits, float* x, int n) {
    for (int i = 0; i < n; i++) { bits[i] = simt::float_to_half(x[i]); x[i] = simt::half_to_float(bits[i]); }
}
"""


@pytest.fixture(scope="module")
def module(host_cache: Path) -> HostModule:
    return HostModule(KERNELS, host_cache)


def launch(
    module: HostModule,
    name: str,
    *arguments: Tensor | int,
    threads: int = 64,
    blocks: int = 1,
    shared: int = 0,
    order: int = 0,
) -> None:
    values = [np.int32(argument) if isinstance(argument, int) else argument for argument in arguments]
    module.get_function(name)((blocks, 1, 1), (threads, 1, 1), values, shared, order)


def reversed_by(module: HostModule, name: str, argument: int, order: int, shared: int = 0) -> bool:
    data = torch.arange(64, dtype=torch.int32)
    launch(module, name, data, argument, shared=shared, order=order)
    return torch.equal(data, torch.arange(63, -1, -1, dtype=torch.int32))


def test_a_missing_barrier_shows_in_every_order(module: HostModule) -> None:
    for order in ORDERS:
        assert reversed_by(module, "reverse", 1, order)
        assert not reversed_by(module, "reverse", 0, order)


def test_a_warp_that_runs_ahead_is_found_in_odd_orders(module: HostModule) -> None:
    """In them the first warp is through before the other one runs; in even ones it is hardly ahead."""
    for order in ORDERS:
        assert reversed_by(module, "reverse_and_overwrite", 1, order)
        assert order % 2 == 0 or not reversed_by(module, "reverse_and_overwrite", 0, order)


def test_dynamic_shared_memory_ends_at_a_page(module: HostModule) -> None:
    assert reversed_by(module, "reverse_dynamic", 0, 0, shared=256)
    with pytest.raises(CudaError, match=r"illegal memory access at .* \[block 0,0,0 thread 63,0,0\]"):
        reversed_by(module, "reverse_dynamic", 1, 0, shared=256)
    with pytest.raises(CudaError, match="the launch gives none"):
        reversed_by(module, "reverse_dynamic", 0, 0)


def test_shared_memory_is_poisoned_for_each_block(module: HostModule) -> None:
    data = torch.zeros(64, dtype=torch.int32)
    launch(module, "read_uninitialised", data, blocks=2)
    assert (data == -0x34343435).all()  # 0xCBCBCBCB


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_barriers", "divergent __syncthreads"),
        ("barrier_without_all", "__syncthreads waits for threads that ended"),
        ("shuffle_without_all", "deadlock: a warp collective"),
        ("lanes_disagree", "lanes disagree"),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_threads_that_never_meet_are_found(module: HostModule, name: str, message: str, order: int) -> None:
    with pytest.raises(CudaError, match=message):
        launch(module, name, torch.zeros(64, dtype=torch.int32), order=order)
    assert reversed_by(module, "reverse", 1, order)  # and the next launch is none the worse


@pytest.mark.parametrize("index", [16, 1000, -1100])  # the pages after the array, and before it
def test_an_address_outside_an_array_is_a_fault(module: HostModule, index: int) -> None:
    with pytest.raises(CudaError, match="illegal memory access"):
        launch(module, "touch", torch.zeros(16, dtype=torch.int32), index)


def test_a_write_between_array_and_page_is_found(module: HostModule) -> None:
    data = torch.zeros(15, dtype=torch.int32)
    with pytest.raises(AssertionError, match="past the end"):
        launch(module, "touch", data, 15)
    with pytest.raises(CudaError, match="illegal memory access"):
        module.get_function("touch")((1, 1, 1), (1, 1, 1), [data, np.int32(15)], alignment=Tensor.element_size)


def test_an_index_outside_a_shared_array_is_found(module: HostModule) -> None:
    data = torch.zeros(1, dtype=torch.int32)
    launch(module, "static_index", data, 63)
    assert data.tolist() == [1]
    with pytest.raises(CudaError, match="index outside an array"):
        launch(module, "static_index", data, 64)


def test_a_misaligned_vector_is_found(module: HostModule) -> None:
    data = torch.arange(8, dtype=torch.int32)
    launch(module, "wide_load", data, 4)
    assert data[0] == 7
    with pytest.raises(CudaError, match="misaligned"):
        launch(module, "wide_load", data, 1)


def test_an_asynchronous_copy_needs_its_wait(module: HostModule) -> None:
    data = torch.tensor([5, 6, 7, 8], dtype=torch.int32)
    launch(module, "copy_async", data, 1, threads=1)
    assert data.tolist() == [5, 6, 7, 0]  # 12 bytes are valid, the rest is zeros
    with pytest.raises(CudaError, match=r"with cp\.async under way"):
        launch(module, "copy_async", data, 0, threads=1)


def test_warp_collectives_compute_what_they_should(module: HostModule) -> None:
    for order in ORDERS:
        data = torch.arange(96, dtype=torch.int32)
        launch(module, "warp_sums", data, threads=96, order=order)
        wanted = [[sum(range(32 * warp, 32 * warp + 32)), *[16] * 31] for warp in range(3)]
        assert data.reshape(3, 32).tolist() == wanted


def test_arguments_have_the_size_of_the_parameter(module: HostModule) -> None:
    scalars = module.get_function("scalars")
    out = torch.zeros(3, dtype=torch.int64)

    def call(*values: object) -> None:
        scalars((1, 1, 1), (1, 1, 1), [out, *values])

    call(np.int32(-3), np.int64(2**40), np.float32(1.5))
    assert out.tolist() == [-3, 2**40, 3]
    with pytest.raises(TypeError, match="argument 2: 4 bytes for a parameter of 8"):
        call(np.int32(-3), np.int32(1), np.float32(1.5))
    with pytest.raises(TypeError, match="4 parameters, 3 were given"):
        call(np.int32(-3), np.int64(1))


@pytest.mark.parametrize(
    ("grid", "block"), [((0, 1, 1), (1, 1, 1)), ((1, 1, 1), (1025, 1, 1)), ((1, 65536, 1), (1, 1, 1))]
)
def test_an_impossible_launch_is_refused(module: HostModule, grid: Sequence[int], block: Sequence[int]) -> None:
    with pytest.raises(CudaError, match="invalid launch"):
        module.get_function("touch")(tuple(grid), tuple(block), [torch.zeros(1, dtype=torch.int32), np.int32(0)])
    with pytest.raises(CudaError, match="too much shared memory"):
        reversed_by(module, "reverse_dynamic", 0, 0, shared=100 * 1024)


def test_denormals_are_flushed_as_cupy_has_it(module: HostModule) -> None:
    x = torch.tensor([1.5e-38, 1.0])
    launch(module, "flush", x, threads=1)
    assert x[1] == 0
    assert float(torch.tensor(1.5e-38) * 0.5) > 0  # the mode ends with the launch


def test_half_conversions_are_those_of_torch(module: HostModule) -> None:
    torch.manual_seed(0)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    between = (every[:-1] + every[1:]) / 2  # ties
    edges = torch.tensor([65519.0, 65520.0, 1e6, -1e6, 2**-25, 2**-24, 3e-8, 0.0, -0.0])
    x = torch.cat([every, between, edges, torch.randn(4096)])
    x = x[x.isfinite()]
    bits, wanted = torch.zeros(len(x), dtype=torch.int16), x.to(torch.float16)
    launch(module, "halves", bits, x, len(x), threads=1)
    assert torch.equal(bits, wanted.view(torch.int16))
    assert torch.equal(x, wanted.float())


def test_guarded_memory_is_where_it_says() -> None:
    for n, alignment, room in [(10, 16, 16), (10, 2, 10), (4096, 16, 4096), (4096, 4, 4100), (0, 16, 0)]:
        memory = Guarded(n, alignment)
        assert memory.address % alignment == 0
        assert (memory.address + room) % 4096 == 0
        memory.close()
