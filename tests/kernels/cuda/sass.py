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
_FUNCTION = re.compile(r"^//-+ \.text\.(\w+) +-+$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


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
    if program := disassembler():
        command = [program, "-c", str(cubin)]
        code = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        _, *functions = _FUNCTION.split(code)  # a name, its instructions, the next name …
        for name, text in zip(functions[::2], functions[1::2], strict=True):
            kernels[name].opcodes = Counter(opcode.split(".")[0] for opcode in _INSTRUCTION.findall(text))
    return kernels


@functools.cache
def disassembler() -> str | None:
    """nvdisasm: of the toolkit, or of the wheel nvidia-cuda-nvdisasm."""
    wheels = (f"{path}/nvidia/cu13/bin" for path in site.getsitepackages())
    return shutil.which("nvdisasm", path=os.pathsep.join([os.environ["PATH"], *wheels]))
