"""cupy_backend without a GPU: a stand-in for CuPy takes its calls and runs them on the CPU model."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fbitrain.kernels import cuda_ops, cupy_backend, reference
from fbitrain.kernels.cuda_plan import Array, Gpu, Launch, Long
from fbitrain.kernels.cupy_backend import CupyDevice
from tests.kernels.cuda_on_cpu.host_module import HostFunction, HostModule

STREAM = 0x5EED  # the handle of torch's current stream


class StandIn:
    """What cupy_backend uses of CuPy 14; `calls` holds the name, GPU and stream of each launch.

    `device` is the current GPU, `destroyed` the streams that CuPy has destroyed.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self.calls: list[dict[str, Any]] = []
        self.options: list[tuple[str, ...]] = []
        self.device = self.current = 0
        self.destroyed: list[int] = []
        self.cuda = SimpleNamespace(
            Stream=SimpleNamespace(from_external=lambda stream: StandInStream(self, stream)),
            nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
        )

    def RawModule(self, *, code: str, options: tuple[str, ...], backend: str) -> Any:
        assert backend == "nvrtc"
        self.options.append(options)
        module = HostModule(code, self._cache, ["FBITRAIN_ARCH=800"])
        return SimpleNamespace(get_function=lambda name: StandInKernel(self, module.get_function(name)))


class StandInStream:
    """A Stream made of a foreign one. As in CuPy 14 it belongs to the GPU that was current then, and ends with it."""

    def __init__(self, cupy: StandIn, stream: Any) -> None:
        self._cupy, self._device = cupy, cupy.device
        version, self._handle = stream.__cuda_stream__()
        assert version == 0

    def __enter__(self) -> None:
        if self._device != self._cupy.device:
            raise RuntimeError(f"a stream of GPU {self._device} on GPU {self._cupy.device}")
        self._cupy.current = self._handle

    def __exit__(self, *error: object) -> None:
        self._cupy.current = 0

    def __del__(self) -> None:
        if self._handle:
            self._cupy.destroyed.append(self._handle)


class StandInKernel:
    """A RawKernel; refuses more dynamic shared memory than was asked for."""

    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, cupy: StandIn, function: HostFunction) -> None:
        self._cupy, self._function = cupy, function

    def __call__(self, grid: Any, block: Any, arguments: tuple[np.generic, ...], *, shared_mem: int) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        assert all(isinstance(argument, np.generic) for argument in arguments)
        where = {"device": self._cupy.device, "stream": self._cupy.current}
        self._cupy.calls.append({"kernel": self._function.name, **where})
        self._function(grid, block, arguments, shared_mem)


class CpuMemory(CupyDevice):
    """Allocates where the stand-in can reach it."""

    def __init__(self, cupy: StandIn, index: int) -> None:
        super().__init__(index, 80)
        self._cupy = cupy

    def launch(self, launch: Launch, tensors: Mapping[str, torch.Tensor | None]) -> None:
        self._cupy.device = self.index  # as cupy_backend.kernel does for the real ones
        super().launch(launch, tensors)

    def empty(self, array: Array) -> torch.Tensor:
        return torch.empty(array.shape, dtype=getattr(torch, array.dtype))


@pytest.fixture
def cupy(host_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn(host_cache)
    monkeypatch.setattr(cupy_backend, "_cupy", lambda: stand_in)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=STREAM + index))
    for remembered in (cupy_backend._module, cupy_backend._stream):
        remembered.cache_clear()
    yield stand_in
    for remembered in (cupy_backend._module, cupy_backend._stream):
        remembered.cache_clear()


def test_ops_are_launched_on_the_stream_of_torch(cupy: StandIn) -> None:
    """From the op to the arguments as the kernel gets them, opt-in to more shared memory included."""
    device = CpuMemory(cupy, 1)
    torch.manual_seed(0)
    a, b = torch.randn(70, 100), torch.randn(9, 100)
    a_words, b_words = cuda_ops.pack_signs(device, a), cuda_ops.pack_signs(device, b)
    assert torch.equal(a_words, reference.pack_signs(a))
    product = cuda_ops.xnor_gemm(device, a_words, b_words, 100)
    assert torch.equal(product, reference.xnor_gemm(a_words, b_words, 100))
    names = ["pack_signs_float32", "pack_signs_float32", "row_popcounts", "row_popcounts", "xnor_tile_128x128"]
    assert [call["kernel"] for call in cupy.calls] == names
    assert {call["stream"] for call in cupy.calls} == {STREAM + 1}
    assert cupy.options == [("--std=c++17",)] * 2  # one module for each source


def test_each_gpu_has_its_own_default_stream(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them have the handle 0."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=0))
    w = torch.tensor([[1.0, -1.0, 1.0]])
    for index in (0, 1, 0):
        assert cuda_ops.pack_signs(CpuMemory(cupy, index), w).tolist() == [[5]]
    assert [(call["device"], call["stream"]) for call in cupy.calls] == [(0, 0), (1, 0), (0, 0)]


def test_no_stream_of_torch_is_destroyed(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are: torch has 32 of each priority for each GPU, and programs bring their own."""
    device, w = CpuMemory(cupy, 0), torch.ones(1, 3)
    for handle in range(1, 300):
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda index, handle=handle: SimpleNamespace(cuda_stream=handle)
        )
        cuda_ops.pack_signs(device, w)
    gc.collect()
    assert [call["stream"] for call in cupy.calls] == list(range(1, 300))
    assert not cupy.destroyed


def test_arguments_are_passed_by_value() -> None:
    tensor = torch.zeros(2)
    tensors = {"x": tensor, "nothing": None}
    for argument, wanted in [
        ("x", np.uint64(tensor.data_ptr())),
        ("nothing", np.uint64(0)),
        (-3, np.int32(-3)),
        (Long(2**40), np.int64(2**40)),
        (0.5, np.float32(0.5)),
    ]:
        value = cupy_backend._argument(argument, tensors)
        assert (type(value), value) == (type(wanted), wanted)
    with pytest.raises(OverflowError):
        cupy_backend._argument(2**31, tensors)


def test_older_cupy_gets_the_handle_itself(cupy: StandIn) -> None:
    cupy.cuda = SimpleNamespace(Stream=SimpleNamespace(), ExternalStream=lambda *of: ("external", *of))
    assert cupy_backend._stream(1, 7) == ("external", 7, 1)


def test_only_what_the_kernels_ask_for_is_raised(cupy: StandIn) -> None:
    device = CupyDevice(0, 80)
    small = Launch("xnor_tile", "row_popcounts", (1, 1, 1), (32, 1, 1), ())
    large = Launch("xnor_tile", "xnor_tile_128x128", (1, 1, 1), (32, 1, 1), (), shared_bytes=61440)
    assert device._compiled(small).max_dynamic_shared_size_bytes == 48 * 1024
    assert device._compiled(large).max_dynamic_shared_size_bytes == 61440
    assert device._compiled(large) is device._compiled(large)


# Why the kernels do not run


@pytest.fixture
def asked_anew() -> Iterator[None]:
    for remembered in (cupy_backend.why_not, cupy_backend.gpu):
        remembered.cache_clear()
    yield
    for remembered in (cupy_backend.why_not, cupy_backend.gpu):
        remembered.cache_clear()


@pytest.mark.usefixtures("asked_anew")
def test_the_first_thing_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cupy_backend.why_not().startswith("no cupy; pip install ")
    cases: list[tuple[str | None, bool, Any, str]] = [
        (None, False, None, "this torch is built without CUDA"),
        ("13.0", False, None, "no driver, or no GPU that it knows"),
        (
            "13.0",
            True,
            ImportError("libcuda.so.1: cannot open\nmore"),
            "cupy does not work here: libcuda.so.1: cannot open",
        ),
        ("13.0", True, RuntimeError(), "cupy does not work here: RuntimeError()"),
        ("13.0", True, (13, 0), ""),
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for cuda, driver, nvrtc, reason in cases:

        def version(answer: Any = nvrtc) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        module = SimpleNamespace(cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=version)))
        monkeypatch.setattr(cupy_backend, "_cupy", lambda module=module: module)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda driver=driver: driver)
        cupy_backend.why_not.cache_clear()
        assert cupy_backend.why_not() == reason


@pytest.mark.usefixtures("asked_anew")
def test_the_least_capable_gpu_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_backend, "why_not", lambda: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 6)][index])
    assert cupy_backend.gpu() == Gpu(86)


@pytest.mark.usefixtures("asked_anew")
def test_a_gpu_without_kernels_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_backend, "why_not", lambda: "no cupy")
    with pytest.warns(RuntimeWarning, match=r"the CUDA kernels do not run \(no cupy\)"):
        assert cupy_backend.gpu() == Gpu(0, "no cupy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cupy_backend.gpu()


def test_importing_it_is_silent_and_leaves_cupy_alone(tmp_path: Path) -> None:
    code = (
        "import sys; from fbitrain.kernels import cupy_backend, dispatch, ops; "
        "print(not cupy_backend.why_not(), 'cupy' in sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    available, imported = done.stdout.split()
    assert available == "False" or torch.cuda.is_available()
    assert imported == available
    assert not (tmp_path / ".cupy").exists()
