"""Shared by the CUDA tests: a model of a GPU that runs the kernels' sources on the CPU."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernels.cuda_on_cpu.host_device import HostDevice
from tests.kernels.cuda_on_cpu.host_module import compiler

MakeDevice = Callable[..., HostDevice]


@pytest.fixture(scope="session")
def host_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels compiled for the CPU lie; skips where they cannot be."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        pytest.skip(f"CUDA kernels are not executed: the CPU model is for Linux on x86-64, not {platform.platform()}")
    if compiler() is None:
        pytest.skip("CUDA kernels are not executed: there is no g++ on PATH")
    return tmp_path_factory.mktemp("cuda_on_cpu")


@pytest.fixture
def host_device(host_cache: Path) -> MakeDevice:
    """Makes a HostDevice(capability=80, order=0, alignment=16)."""
    return functools.partial(HostDevice, host_cache)
