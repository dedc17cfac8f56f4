"""The CUDA kernels on a real GPU: compiled by CuPy (NVRTC), launched on torch's stream and on torch's memory.

CuPy is imported by the first call that needs it, never by importing this module. It keeps what it has compiled, per
architecture, in `cpu_build.cache_folder()`/cupy, or where CUPY_CACHE_DIR says.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fbitrain.kernels import cuda_linear, cuda_ops
from fbitrain.kernels.cpu_build import cache_folder
from fbitrain.kernels.cuda_plan import Argument, Array, Gpu, Launch, Long
from fbitrain.kernels.cuda_source import OPTIONS, source_text

STATIC_LIMIT = 48 * 1024  # bytes of shared memory that a kernel gets without asking
RUN: dict[str, Callable[..., Tensor]] = {
    "pack_signs": cuda_ops.pack_signs,
    "unpack_signs": cuda_ops.unpack_signs,
    "xnor_gemm": cuda_ops.xnor_gemm,
    "binary_linear": cuda_linear.binary_linear,
    "mixture_linear": cuda_linear.mixture_linear,
    "partial_linear": cuda_linear.partial_linear,
}
DTYPES = {  # of floats, by op
    **dict.fromkeys(("pack_signs", "unpack_signs"), cuda_ops.DTYPES),
    **dict.fromkeys(("binary_linear", "mixture_linear", "partial_linear"), cuda_linear.DTYPES),
}


@functools.cache
def why_not() -> str:
    """Why the kernels do not run on this machine; "" if they do. Without CuPy or a GPU nothing is imported."""
    if importlib.util.find_spec("cupy") is None:
        return "no cupy; pip install 'fbitrain[cuda12]' or 'fbitrain[cuda13]'"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no driver, or no GPU that it knows"
    try:
        _cupy().cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        return f"cupy does not work here: {(str(error).strip() or repr(error)).splitlines()[0]}"
    return ""


@functools.cache
def gpu() -> Gpu:
    """The GPU that `dispatch` chooses for: of several, the least capable, because a call may be on any.

    Says so once if there is a GPU and its kernels do not run.
    """
    if reason := why_not():
        text = f"the CUDA kernels do not run ({reason}). Until then the binary ops run in plain torch, slowly."
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return Gpu(0, reason)
    return Gpu(min(_capability(i) for i in range(torch.cuda.device_count())))


def kernel(op: str) -> Callable[..., Tensor]:
    """The function that runs `op` on the GPU of its first argument; the arguments are those of its reference."""

    def run(*arguments: Any) -> Tensor:
        index = arguments[0].device.index
        with torch.cuda.device(index):
            return RUN[op](_device(index), *arguments)

    return run


class CupyDevice:
    """One GPU, as cuda_run.Device describes it. It must be torch's current device during `empty` and `launch`.

    Both use torch's current stream there: a temporary that is freed while its kernel waits to run can be given only to
    work that comes after it. Tensors of the caller that belong to another stream are the caller's to order, as with
    any torch op.
    """

    def __init__(self, index: int, capability: int) -> None:
        self.index, self.capability = index, capability
        self._kernels: dict[tuple[str, str], Any] = {}

    def empty(self, array: Array) -> Tensor:
        return torch.empty(array.shape, dtype=getattr(torch, array.dtype), device=f"cuda:{self.index}")

    def launch(self, launch: Launch, tensors: Mapping[str, Tensor | None]) -> None:
        arguments = tuple(_argument(argument, tensors) for argument in launch.arguments)
        compiled = self._compiled(launch)
        with _stream(self.index, torch.cuda.current_stream(self.index).cuda_stream):
            compiled(launch.grid, launch.block, arguments, shared_mem=launch.shared_bytes)

    def _compiled(self, launch: Launch) -> Any:
        known = self._kernels.get((launch.source, launch.kernel))
        if known is None:
            known = _module(launch.source).get_function(launch.kernel)
            if launch.shared_bytes > STATIC_LIMIT:
                known.max_dynamic_shared_size_bytes = launch.shared_bytes
            self._kernels[launch.source, launch.kernel] = known
        return known


def _argument(argument: Argument, tensors: Mapping[str, Tensor | None]) -> np.generic:
    """By value, in the size of the C parameter: CuPy copies a numpy scalar's bytes."""
    value: np.generic
    if isinstance(argument, str):
        tensor = tensors[argument]
        value = np.uint64(0 if tensor is None else tensor.data_ptr())
    elif isinstance(argument, Long):
        value = np.int64(argument.value)
    else:
        value = np.float32(argument) if isinstance(argument, float) else np.int32(argument)
    return value


@functools.cache
def _cupy() -> Any:
    # CuPy makes its folder when it is imported: ours, not ~/.cupy.
    os.environ.setdefault("CUPY_CACHE_DIR", str(cache_folder() / "cupy"))
    import cupy

    return cupy


@functools.cache
def _module(source: str) -> Any:
    return _cupy().RawModule(code=source_text(source), options=OPTIONS, backend="nvrtc")


@functools.cache
def _device(index: int) -> CupyDevice:
    return CupyDevice(index, _capability(index))


def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


class _TorchStream:
    """A CUDA stream by its handle, in the protocol that CuPy 14 and later ask for."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@functools.cache
def _stream(index: int, handle: int) -> Any:
    """CuPy's name for torch's stream `handle` on GPU `index`, which must be the current one: CuPy 14 asks for it here.

    Kept for good: CuPy 14 destroys the stream with the last reference to such an object, though the stream is torch's.
    The index is part of the key because each GPU's default stream has the handle 0, and CuPy refuses it on another.
    """
    streams = _cupy().cuda
    if hasattr(streams.Stream, "from_external"):
        return streams.Stream.from_external(_TorchStream(handle))
    return streams.ExternalStream(handle, index)  # CuPy 13 and earlier; later ones warn that it is deprecated
