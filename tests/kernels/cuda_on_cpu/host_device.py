"""A model of a GPU for fbitrain.kernels.cuda_run: launches run on the CPU, from the very same sources and plans."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fbitrain.kernels.cuda_plan import Argument, Array, Launch, Long
from fbitrain.kernels.cuda_source import source_text
from tests.kernels.cuda_on_cpu.host_module import HostFunction, HostModule

ORDERS = (0, 1, 2, 3)  # in which threads take turns: forward, backward, two random ones; in odd ones warp after warp


@dataclass
class HostDevice:
    """`alignment`: of a call's tensors, 16 bytes or (None) no more than their elements need, as of slices; what the
    plan allocates is always aligned, as by torch. `launched` names the kernels."""

    cache: Path
    capability: int = 80
    order: int = 0
    alignment: int | None = 16
    launched: list[str] = field(default_factory=list)
    allocated: dict[int, Tensor] = field(default_factory=dict)  # by address

    def empty(self, array: Array) -> Tensor:
        """Filled with a pattern, so that an element that no kernel writes shows."""
        tensor = torch.empty(array.shape, dtype=getattr(torch, array.dtype))
        tensor.view(-1).view(torch.uint8).fill_(0xCB)
        self.allocated[tensor.data_ptr()] = tensor
        return tensor

    def launch(self, launch: Launch, tensors: Mapping[str, Tensor | None]) -> None:
        self.launched.append(launch.kernel)
        function = _function(self.cache, launch.source, launch.kernel, self.capability)
        arguments = [_argument(argument, tensors) for argument in launch.arguments]
        function(launch.grid, launch.block, arguments, launch.shared_bytes, self.order, self._alignment)

    def _alignment(self, tensor: Tensor) -> int:
        own = tensor.element_size() if tensor.data_ptr() not in self.allocated else 16
        return self.alignment or own


@functools.cache
def _module(cache: Path, source: str, capability: int) -> HostModule:
    return HostModule(source_text(source), cache, [f"FBITRAIN_ARCH={capability * 10}"])


@functools.cache
def _function(cache: Path, source: str, kernel: str, capability: int) -> HostFunction:
    return _module(cache, source, capability).get_function(kernel)


def _argument(argument: Argument, tensors: Mapping[str, Tensor | None]) -> Tensor | np.generic | None:
    if isinstance(argument, str):
        return tensors[argument]
    if isinstance(argument, Long):
        return np.int64(argument.value)
    return np.float32(argument) if isinstance(argument, float) else np.int32(argument)
