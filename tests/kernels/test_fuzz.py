"""The C functions under AddressSanitizer and UBSan: random shapes, wrong arguments, arrays allocated to the byte."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fbitrain.kernels import cpu, cpu_build

HERE = Path(__file__).parent
SANITIZE = ("-std=gnu++17", "-O0", "-g1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def fuzz(cxx: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The harness, linked with the kernels: AVX2 as it is where the CPU has it, AVX-512 and AMX emulated."""
    folder = tmp_path_factory.mktemp("fuzz")
    emulated = [f"-I{HERE / 'emulated'}"]
    sources: dict[Path, list[str]] = {
        cpu_build.SOURCES / name: [] for name in cpu_build.BASELINE if name != "cpu_features.cpp"
    }
    sources |= {HERE / "fuzz.cpp": [], HERE / "emulated" / "any_cpu.cpp": []}
    sources |= {cpu_build.SOURCES / "avx512.cpp": emulated, cpu_build.SOURCES / "amx.cpp": emulated}
    defines = ["-DFBITRAIN_AVX512", "-DFBITRAIN_AMX"]
    if runs_avx2():
        sources[cpu_build.SOURCES / "avx2.cpp"] = list(cpu_build.INSTRUCTION_SETS["avx2"])
        defines.append("-DFBITRAIN_AVX2")
    objects = [folder / f"{source.name}.o" for source in sources]
    for (source, flags), built in zip(sources.items(), objects, strict=True):
        include = [*flags, f"-I{cpu_build.SOURCES}", "-c", str(source), "-o", str(built)]
        subprocess.run([*cxx, *SANITIZE, *defines, *include], check=True, timeout=120)
    link = subprocess.run(
        [*cxx, *SANITIZE, *map(str, objects), "-o", str(folder / "fuzz")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if link.returncode:
        pytest.skip(f"the C functions are not fuzzed: no sanitizers to link with: {link.stderr.strip()}")
    return folder / "fuzz"


def runs_avx2() -> bool:
    return not cpu.levels()["avx2"]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_nothing_outside_the_arrays_is_touched(fuzz: Path, seed: int) -> None:
    levels = ["0", *(["1"] if runs_avx2() else []), "2", "3"]
    done = subprocess.run([fuzz, str(seed), "25", *levels], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
