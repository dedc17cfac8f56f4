"""Every CUDA source, compiled for every architecture: nothing spills, and it has the instructions it is for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fbitrain.kernels.cuda_source import SOURCES, source_text
from tests.kernels.cuda.sass import Kernel, compiled, disassembler

# All sources for all of them take about two minutes of CPU time.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SOURCE_NAMES = sorted(path.stem for path in SOURCES.glob("*.cu"))
BITS, BYTES = "BMMA", "IMMA"

# Instructions that must, and that must not, be in a kernel: by a kernel's name, or the beginning of several names.
EXPECTED: dict[str, Callable[[int], tuple[set[str], set[str]]]] = {
    "pack_signs": lambda architecture: ({"VOTE"}, set()),
    "unpack_signs": lambda architecture: ({"SHFL"}, set()),
    "xnor_popc": lambda architecture: ({"POPC"}, set()),
    "row_popcounts": lambda architecture: ({"POPC"}, set()),
    # LDGSTS is cp.async, LDSM ldmatrix; MOVM would betray the emulated product of bits.
    "xnor_tile": lambda architecture: ({"LDGSTS", "LDSM", BITS if architecture < 100 else BYTES}, {"MOVM", "POPC"}),
    "prologue": lambda architecture: ({"LDG"}, set()),
    "decode_int8": lambda architecture: ({BYTES}, set()),
    "decode": lambda architecture: ({"HMMA"}, set()),
    "partial_int8": lambda architecture: ({BYTES}, set()),
    "partial": lambda architecture: ({"HMMA"}, set()),
    "planes": lambda architecture: ({BITS} if architecture < 100 else set(), {"POPC"}),  # not launched from sm_100 on
    "prefill_int8": lambda architecture: ({"LDGSTS", BYTES}, set()),
    "prefill": lambda architecture: ({"LDGSTS", "HMMA"}, set()),
    "fp32": lambda architecture: ({"FFMA"}, {"HMMA"}),
}


@pytest.fixture(scope="session")
def all_kernels(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], Future[dict[str, Kernel]]]:
    """What the selected tests ask for, compiled two at a time."""
    if not shutil.which("nvcc"):
        pytest.skip("CUDA kernels are not compiled: there is no nvcc on PATH")
    folder = tmp_path_factory.mktemp("cubins")
    wanted = {
        (item.callspec.params["source"], item.callspec.params["architecture"])
        for item in request.session.items
        if "all_kernels" in getattr(item, "fixturenames", ())
    }
    with ThreadPoolExecutor(2) as pool:
        return {key: pool.submit(compiled, *key, folder) for key in sorted(wanted)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCE_NAMES)
def test_nothing_spills(
    all_kernels: dict[tuple[str, int], Future[dict[str, Kernel]]], source: str, architecture: int
) -> None:
    kernels = all_kernels[source, architecture].result()
    assert kernels
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0, name
        assert kernel.registers <= 255, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCE_NAMES)
def test_kernels_use_the_instructions_they_are_for(
    all_kernels: dict[tuple[str, int], Future[dict[str, Kernel]]], source: str, architecture: int
) -> None:
    if disassembler() is None:
        pytest.skip("instructions are not checked: no nvdisasm (pip install -e '.[dev]' has it)")
    for name, kernel in all_kernels[source, architecture].result().items():
        expected = next((rule for start, rule in EXPECTED.items() if name.startswith(start)), None)
        assert expected, f"say in EXPECTED what {name} is made of"
        needed, refused = expected(architecture)
        assert needed <= set(kernel.opcodes), f"{name} lacks {needed - set(kernel.opcodes)}"
        assert not refused & set(kernel.opcodes), f"{name} has {refused & set(kernel.opcodes)}"


@pytest.mark.parametrize("source", SOURCE_NAMES)
def test_a_source_is_one_text(source: str) -> None:
    """No header is left to be found, and none comes twice."""
    text = source_text(source)
    assert "#include" not in text
    assert "#pragma once" not in text
    lines = [line for line in text.splitlines() if line.startswith("#line 1 ")]
    assert lines[0] == f'#line 1 "{source}.cu"'
    assert len(lines) == len(set(lines))


def test_messages_point_at_the_files() -> None:
    text = source_text("xnor_tile").splitlines()
    at = next(i for i, line in enumerate(text) if line.startswith("constexpr int STEP"))
    marker = max(i for i in range(at) if text[i].startswith("#line"))
    number, file = text[marker].split()[1:]
    line = int(number) + at - marker - 1
    path = Path(__file__).parents[3] / "kernels" / "cuda" / file.strip('"')
    assert path.read_text().splitlines()[line - 1].startswith("constexpr int STEP")
