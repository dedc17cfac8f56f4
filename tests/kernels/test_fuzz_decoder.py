"""The C functions of the decoder under AddressSanitizer and UBSan: random shapes, wrong arguments, exact arrays."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fbitrain.kernels import cpu, cpu_build
from tests.kernels.test_fuzz import SANITIZE

HARNESS = Path(__file__).parent / "fuzz_decoder.cpp"


def test_nothing_outside_the_decoders_arrays_is_touched(cxx: list[str], tmp_path: Path) -> None:
    sets = [name for name in cpu_build.INSTRUCTION_SETS if not cpu.levels()[name.removeprefix("dense_math_")]]
    defines = [f"-DFBITRAIN_{name.upper()}" for name in sets]
    sources = {cpu_build.SOURCES / name: () for name in cpu_build.BASELINE} | {HARNESS: ()}
    sources |= {cpu_build.SOURCES / f"{name}.cpp": cpu_build.INSTRUCTION_SETS[name] for name in sets}
    objects = [tmp_path / f"{source.name}.o" for source in sources]
    for (source, flags), built in zip(sources.items(), objects, strict=True):
        include = [*flags, f"-I{cpu_build.SOURCES}", "-c", str(source), "-o", str(built)]
        subprocess.run([*cxx, *SANITIZE, *defines, *include], check=True, timeout=120)
    link = [*cxx, *SANITIZE, *map(str, objects), "-o", str(tmp_path / "fuzz")]
    linked = subprocess.run(link, capture_output=True, text=True, timeout=120)
    if linked.returncode:
        pytest.skip(f"the decoder is not fuzzed: no sanitizers to link with: {linked.stderr.strip()}")
    done = subprocess.run([tmp_path / "fuzz", "40"], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "40 rounds\n"), done.stderr
