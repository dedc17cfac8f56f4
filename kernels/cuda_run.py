"""Carries out a plan on a device: allocates what it needs and launches its kernels in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fbitrain.kernels.cuda_plan import Array, Launch, Plan


class Device(Protocol):
    """Something that runs CUDA kernels: a GPU, or the tests' model of one."""

    @property
    def capability(self) -> int:
        """80 for compute capability 8.0."""

    def empty(self, array: Array) -> Tensor:
        """A new, uninitialised, contiguous tensor."""

    def launch(self, launch: Launch, tensors: Mapping[str, Tensor | None]) -> None:
        """Starts the kernel after all that were launched before it; None is passed as a null pointer."""


def run(plan: Plan, device: Device, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Launches the plan's kernels on the call's contiguous `tensors`; returns the plan's arrays by name."""
    arrays = {name: device.empty(array) for name, array in plan.arrays.items()}
    known = {**tensors, **arrays}
    for launch in plan.launches:
        device.launch(launch, known)
    return arrays


def dtype_name(dtype: torch.dtype) -> str:
    """As plans name it: "float32"."""
    return str(dtype).removeprefix("torch.")
