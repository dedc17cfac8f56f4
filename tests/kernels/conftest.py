"""Shared by the kernel tests: each CPU level that this machine runs, and an empty cache of compiled kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fbitrain.kernels import cpu, cpu_build

EMULATED = Path(__file__).parent / "emulated"


@pytest.fixture(scope="session")
def cxx() -> list[str]:
    """The command of the C++ compiler; skips what needs one where there is none."""
    try:
        return cpu_build.find_compiler()
    except cpu_build.BuildError as error:
        pytest.skip(f"not compiled and not tested: {error}")


@pytest.fixture(scope="session")
def emulated_library(cxx: list[str], tmp_path_factory: pytest.TempPathFactory) -> cpu.Library:
    """The kernels with AVX-512 and AMX, compiled against emulated/immintrin.h: they run on any CPU."""
    sources = [cpu_build.SOURCES / name for name in cpu_build.BASELINE if name != "cpu_features.cpp"]
    sources += [cpu_build.SOURCES / f"{name}.cpp" for name in ("avx512", "amx", "dense_math_avx512")]
    sources.append(EMULATED / "any_cpu.cpp")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    defines = [
        "-DFBITRAIN_AVX512",
        "-DFBITRAIN_AMX",
        "-DFBITRAIN_DENSE_MATH_AVX512",
        "-Wno-psabi",
        f"-I{EMULATED}",
        f"-I{cpu_build.SOURCES}",
    ]
    command = [*cxx, *cpu_build.FLAGS, "-O1", *defines, "-shared", *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return cpu.Library(library)


@pytest.fixture
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A level to test: one that this machine runs, or an emulated one."""
    name: str = request.param
    if name.endswith(" (emulated)"):
        library = request.getfixturevalue("emulated_library")
        monkeypatch.setattr(cpu, "_library", lambda: library)
    return name.removesuffix(" (emulated)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`level` stands for each level in turn; test_cpu.test_this_machine_runs says which only run emulated, and why."""
    if "level" in metafunc.fixturenames and metafunc.function.__name__ != "test_this_machine_runs":
        levels = [name for name, why_not in cpu.levels().items() if not why_not]
        metafunc.parametrize("level", [*levels, "avx512 (emulated)", "amx (emulated)"], indirect=True)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FBITRAIN_KERNEL_CACHE, set to a folder that does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FBITRAIN_KERNEL_CACHE", str(folder))
    return folder
