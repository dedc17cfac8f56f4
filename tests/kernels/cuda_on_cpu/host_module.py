"""CUDA C++ source text as functions that run on the CPU (see simt.h), with the call shape of cupy.RawModule."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from tests.kernels.cuda_on_cpu.guarded import Guarded

HERE = Path(__file__).parent
FLAGS = (
    *("-x", "c++", "-std=gnu++17", "-w", "-fPIC", "-shared", "-O1", "-ffp-contract=off", "-fno-strict-aliasing"),
    # A misaligned vector access is an error on a GPU; x86 would let it pass.
    *("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error", "-fno-stack-protector"),
)
_KERNEL = re.compile(r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')

Argument = Tensor | np.generic | None


class CudaError(RuntimeError):
    """What would be an error, or undefined, on a GPU."""


@functools.cache
def compiler() -> str | None:
    """g++, or None: clang has no -fsanitize-undefined-trap-on-error and compiles the fibers differently."""
    return shutil.which("g++")


class HostModule:
    """A compiled source. `defines` are NAME=VALUE; libraries are kept in `cache`."""

    def __init__(self, source: str, cache: Path, defines: Sequence[str] = ()) -> None:
        self._library = ctypes.CDLL(str(_compiled(source, cache, [f"-D{define}" for define in defines])))

    def get_function(self, name: str) -> HostFunction:
        return HostFunction(self._library, name)


class HostFunction:
    """One kernel."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.name = name
        self._launch = getattr(library, f"{name}__launch")
        self._launch.restype = ctypes.c_char_p
        sizes = (ctypes.c_int * 64)()
        n = getattr(library, f"{name}__parameters")(sizes)
        self._sizes = list(sizes[:n])

    def __call__(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: Sequence[Argument],
        shared_mem: int = 0,
        order: int = 0,
        alignment: Callable[[Tensor], int] = lambda tensor: 16,
    ) -> None:
        """Runs the kernel on guarded copies of the tensors and copies them back; None is a null pointer.

        `order` in which threads take turns: 0 forward, 1 backward, otherwise the seed of a random one. Each array ends
        at a page that cannot be touched, as close as the alignment allows that it is given. Raises CudaError.
        """
        values, guarded = self._values(arguments, alignment)
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        shared = Guarded(shared_mem, 16)
        three = ctypes.c_uint * 3
        size = ctypes.c_size_t(shared_mem)
        place = ctypes.c_void_p(shared.address)
        problem = self._launch(three(*grid), three(*block), place, size, pointers, ctypes.c_int(order))
        shared.close()
        for tensor, copy in guarded.values():
            copy.check()
            ctypes.memmove(tensor.data_ptr(), copy.address, copy.n)
            copy.close()
        if problem:
            raise CudaError(f"{self.name}: {problem.decode()}")

    def _values(
        self, arguments: Sequence[Argument], alignment: Callable[[Tensor], int]
    ) -> tuple[list[np.ndarray], dict[int, tuple[Tensor, Guarded]]]:
        """Each argument as an array of its bytes, and the guarded copies by the address of their original."""
        if len(arguments) != len(self._sizes):
            raise TypeError(f"{self.name} has {len(self._sizes)} parameters, {len(arguments)} were given")
        values: list[np.ndarray] = []
        guarded: dict[int, tuple[Tensor, Guarded]] = {}
        for i, (argument, size) in enumerate(zip(arguments, self._sizes, strict=True)):
            if isinstance(argument, Tensor):
                assert argument.is_contiguous()
                assert argument.device.type == "cpu"
                if argument.data_ptr() not in guarded:
                    copy = Guarded(argument.nbytes, alignment(argument))
                    ctypes.memmove(copy.address, argument.data_ptr(), copy.n)
                    guarded[argument.data_ptr()] = argument, copy
                value = np.array([guarded[argument.data_ptr()][1].address], np.uint64)
            else:
                value = np.array([0], np.uint64) if argument is None else np.array([argument])
            if value.itemsize != size:
                raise TypeError(f"{self.name}, argument {i}: {value.itemsize} bytes for a parameter of {size}")
            values.append(value)
        return values, guarded


def _compiled(source: str, cache: Path, defines: list[str]) -> Path:
    """The shared library, compiled if the cache does not hold it.

    It is known by the preprocessed text: a define that changes nothing, such as another architecture, costs nothing.
    """
    headers = "".join(path.read_text() for path in sorted(HERE.glob("*.h")))
    preprocessed = _run(["-E", "-P", "-x", "c++", "-w", *defines, "-DSIMT_HOST", "-"], source)
    digest = hashlib.sha256(repr((FLAGS, headers, preprocessed)).encode()).hexdigest()[:20]
    library = cache / f"{digest}.so"
    if library.exists():
        return library
    source += "\n" + "\n".join(f"SIMT_EXPORT({name})" for name in _KERNEL.findall(preprocessed))
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / library.name
        _run([*FLAGS, *defines, "-include", str(HERE / "simt.h"), "-", "-o", str(built)], source)
        os.replace(built, library)
    return library


def _run(arguments: list[str], source: str) -> str:
    command = [str(compiler()), *arguments]
    done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return done.stdout
