"""Which implementation runs an op: a pure function of the call and of what the machine can do, which doctor.py prints.

Every op lists its backends in BACKENDS, fastest first. The environment variable FBITRAIN_BACKEND forces one by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fbitrain.kernels import cpu, reference
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


@dataclass(frozen=True)
class Availability:
    """Whether a backend runs a call, and the reason, if there is one to tell."""

    runs: bool
    reason: str = ""

    def __str__(self) -> str:
        return ("yes" if self.runs else "no") + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Backend:
    """One implementation of one op. `availability` is given the call and `cpu.levels()` (empty for other devices)."""

    name: str
    run: Callable[..., Tensor]
    availability: Callable[[Call, Mapping[str, str]], Availability]


@dataclass(frozen=True)
class Choice:
    """Which backend runs `op`, and for every known backend whether it could."""

    op: str
    backend: str
    reasons: dict[str, Availability]

    def __str__(self) -> str:
        return f"{self.op}: {' | '.join(f'{name} {why}' for name, why in self.reasons.items())} -> {self.backend}"


def _anywhere(call: Call, levels: Mapping[str, str]) -> Availability:
    return Availability(True)


def _on_cpu(level: str) -> Callable[[Call, Mapping[str, str]], Availability]:
    def availability(call: Call, levels: Mapping[str, str]) -> Availability:
        if call.device_type != "cpu":
            return Availability(False, "only for cpu")
        if call.op != "xnor_gemm" and call.dtype not in cpu.DTYPES[call.op]:
            return Availability(False, f"not for {call.dtype}")
        if call.group_size % WORD_BITS:
            return Availability(False, f"group_size={call.group_size} is not a multiple of {WORD_BITS}")
        return Availability(not levels[level], levels[level])

    return availability


BACKENDS: dict[str, list[Backend]] = {
    op: [
        *(Backend(level, cpu.kernel(op, level), _on_cpu(level)) for level in cpu.LEVELS),
        Backend("reference", getattr(reference, op), _anywhere),
    ]
    for op in OPS
}


def select_backend(call: Call, levels: Mapping[str, str] | None = None) -> Choice:
    """The first backend that runs `call`; FBITRAIN_BACKEND forces one.

    `levels` says of each CPU level why it does not run ("" if it does); by default this machine is asked, which
    compiles the kernels if they are not in the cache. Raises BackendError when the forced backend is unknown or cannot
    run.
    """
    if levels is None:
        levels = cpu.levels() if call.device_type == "cpu" else {}
    reasons = {backend.name: backend.availability(call, levels) for backend in BACKENDS[call.op]}
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
    return _remembered(call, os.environ.get(FORCE_VARIABLE, ""))


@lru_cache(maxsize=256)
def _remembered(call: Call, forced: str) -> Callable[..., Tensor]:
    chosen = select_backend(call).backend
    return next(backend.run for backend in BACKENDS[call.op] if backend.name == chosen)
