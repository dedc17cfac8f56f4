"""Which implementation runs an op: a pure function of the call and of what the machine can do, which doctor.py prints.

Every op lists its backends in BACKENDS, those of a device fastest first. The environment variable FBITRAIN_BACKEND
forces one by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fbitrain.kernels import cpu, cupy_backend, reference
from fbitrain.kernels.cuda_plan import MIN_CAPABILITY, Gpu
from fbitrain.kernels.layout import WORD_BITS

FORCE_VARIABLE = "FBITRAIN_BACKEND"
OPS = ("pack_signs", "unpack_signs", "xnor_gemm", "binary_linear", "mixture_linear", "partial_linear")


class BackendError(RuntimeError):
    """FBITRAIN_BACKEND asks for a backend that does not exist or cannot run here."""


class Call(NamedTuple):
    """All that the choice of a backend depends on, apart from the machine."""

    op: str
    device_type: str  # "cpu", "cuda"
    dtype: torch.dtype  # of x, of w, of what unpack_signs returns; xnor_gemm has no floats and ignores it
    group_size: int = 0  # of scale="group"; 0 for the other patterns


class Machine(NamedTuple):
    """All that the choice of a backend depends on, apart from the call."""

    levels: Mapping[str, str]  # of each CPU level why it does not run, "" if it does (`cpu.levels()`)
    gpu: Gpu


NO_GPU = Gpu(0, "no GPU is asked for")


@dataclass(frozen=True)
class Availability:
    """Whether a backend runs a call, and the reason, if there is one to tell."""

    runs: bool
    reason: str = ""

    def __str__(self) -> str:
        return ("yes" if self.runs else "no") + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Backend:
    """One implementation of one op. `availability` is given the call and what the machine can do."""

    name: str
    run: Callable[..., Tensor]
    availability: Callable[[Call, Machine], Availability]


@dataclass(frozen=True)
class Choice:
    """Which backend runs `op`, and for every known backend whether it could."""

    op: str
    backend: str
    reasons: dict[str, Availability]

    def __str__(self) -> str:
        return f"{self.op}: {' | '.join(f'{name} {why}' for name, why in self.reasons.items())} -> {self.backend}"


def _anywhere(call: Call, machine: Machine) -> Availability:
    return Availability(True)


def _on_cpu(level: str) -> Callable[[Call, Machine], Availability]:
    def availability(call: Call, machine: Machine) -> Availability:
        if call.device_type != "cpu":
            return Availability(False, "only for cpu")
        why_not = _refusal(call, cpu.DTYPES) or machine.levels[level]
        return Availability(not why_not, why_not)

    return availability


def _on_cuda(call: Call, machine: Machine) -> Availability:
    if call.device_type != "cuda":
        return Availability(False, "only for cuda")
    if machine.gpu.why_not:
        return Availability(False, machine.gpu.why_not)
    needed = MIN_CAPABILITY[call.op]
    if machine.gpu.capability < needed:
        return Availability(False, f"needs compute capability {needed / 10}, not {machine.gpu.capability / 10}")
    if why_not := _refusal(call, cupy_backend.DTYPES):
        return Availability(False, why_not)
    return Availability(True, f"compute capability {machine.gpu.capability / 10}")


def _refusal(call: Call, dtypes: Mapping[str, tuple[torch.dtype, ...]]) -> str:
    """Why compiled kernels for `dtypes`, by op, do not run `call`; empty if they do."""
    if call.op != "xnor_gemm" and call.dtype not in dtypes[call.op]:
        return f"not for {call.dtype}"
    if call.group_size % WORD_BITS:
        return f"group_size={call.group_size} is not a multiple of {WORD_BITS}"
    return ""


BACKENDS: dict[str, list[Backend]] = {
    op: [
        *(Backend(level, cpu.kernel(op, level), _on_cpu(level)) for level in cpu.LEVELS),
        Backend("cuda", cupy_backend.kernel(op), _on_cuda),
        Backend("reference", getattr(reference, op), _anywhere),
    ]
    for op in OPS
}


def select_backend(call: Call, levels: Mapping[str, str] | None = None, gpu: Gpu | None = None) -> Choice:
    """The first backend that runs `call`; FBITRAIN_BACKEND forces one.

    `levels` says of each CPU level why it does not run ("" if it does), `gpu` what the GPU is. By default this machine
    is asked, which for a call on the CPU compiles the kernels if they are not in the cache, and for one on a GPU
    imports CuPy. Raises BackendError when the forced backend is unknown or cannot run.
    """
    if levels is None:
        levels = cpu.levels() if call.device_type == "cpu" else {}
    if gpu is None:
        gpu = cupy_backend.gpu() if call.device_type == "cuda" else NO_GPU
    machine = Machine(levels, gpu)
    reasons = {backend.name: backend.availability(call, machine) for backend in BACKENDS[call.op]}
    forced = os.environ.get(FORCE_VARIABLE, "")
    if not forced:
        return Choice(call.op, next(name for name, why in reasons.items() if why.runs), reasons)
    if forced not in reasons:
        raise BackendError(
            f"{FORCE_VARIABLE}={forced} is no backend of {call.op}; choose {' or '.join(reasons)}, or unset it"
        )
    if not reasons[forced].runs:
        raise BackendError(
            f"{FORCE_VARIABLE}={forced} cannot run {call.op} on {call.device_type} {call.dtype}: "
            f"{reasons[forced].reason}; unset it"
        )
    return Choice(call.op, forced, reasons)


def runner(call: Call) -> Callable[..., Tensor]:
    """The function that runs `call`. Asked on every call of an op, so it remembers what it found."""
    return _remembered(call, os.environ.get(FORCE_VARIABLE, "")).run


def backend_name(call: Call) -> str:
    """The name of the backend that `runner` gives, as well remembered."""
    return _remembered(call, os.environ.get(FORCE_VARIABLE, "")).name


@lru_cache(maxsize=256)
def _remembered(call: Call, forced: str) -> Backend:
    chosen = select_backend(call).backend
    return next(backend for backend in BACKENDS[call.op] if backend.name == chosen)
