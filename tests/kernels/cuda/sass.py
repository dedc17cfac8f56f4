"""What nvcc makes of a kernel: registers, spills and machine instructions, for any architecture, without a GPU."""

from __future__ import annotations

import functools
import os
import re
import shutil
import site
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fbitrain.kernels.cuda_source import source_text

# As CuPy compiles, see cuda_source.OPTIONS.
FLAGS = ("-x", "cu", "-std=c++17", "-ftz=true", "-cubin", "-Xptxas", "-v")
_RESOURCES = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", re.MULTILINE)


@dataclass
class Kernel:
    """One kernel for one architecture."""

    spilled_bytes: int
    registers: int
    opcodes: Counter[str] = field(default_factory=Counter)  # without what follows the first dot; empty if not known


def compiled(source: str, architecture: int, folder: Path) -> dict[str, Kernel]:
    """The kernels of cuda/SOURCE.cu by name. Raises RuntimeError with nvcc's words if it does not compile."""
    cubin = folder / f"{source}_{architecture}.cubin"
    command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-o", str(cubin), "-"]
    done = subprocess.run(command, input=source_text(source), capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"sm_{architecture}: {done.stderr[:4000]}")
    kernels = {
        match[1]: Kernel(int(match[2]) + int(match[3]), int(match[4])) for match in _RESOURCES.finditer(done.stderr)
    }
    if disassembler():
        for function in re.split(r"\n\s+Function : ", _disassembled(cubin))[1:]:
            name = function.split("\n", 1)[0].strip()
            kernels[name].opcodes = Counter(opcode.split(".")[0] for opcode in _INSTRUCTION.findall(function))
    return kernels


@functools.cache
def disassembler() -> str | None:
    """cuobjdump: of the toolkit, or of the wheel nvidia-cuda-cuobjdump. It needs nvdisasm beside it."""
    folders = [*os.environ["PATH"].split(os.pathsep), *(f"{path}/nvidia/cu13/bin" for path in site.getsitepackages())]
    for folder in folders:
        if shutil.which("cuobjdump", path=folder) and shutil.which("nvdisasm", path=folder):
            return f"{folder}/cuobjdump"
    return None


def _disassembled(cubin: Path) -> str:
    program = str(disassembler())
    path = f"{Path(program).parent}{os.pathsep}{os.environ['PATH']}"
    command = [program, "-sass", str(cubin)]
    environment = {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment).stdout
