"""The kernels' pool of threads: forks while it works, memory and processors that are not to be had."""

from __future__ import annotations

import subprocess
from pathlib import Path

from fbitrain.kernels import cpu_build

HARNESS = Path(__file__).parent / "threads.cpp"


def test_the_pool_lives_through_forks_and_lack_of_memory(cxx: list[str], tmp_path: Path) -> None:
    sources = [str(HARNESS), str(cpu_build.SOURCES / "threads.cpp")]
    program = tmp_path / "threads"
    command = [*cxx, "-std=c++17", "-O1", "-pthread", f"-I{cpu_build.SOURCES}", *sources, "-o", str(program)]
    subprocess.run(command, check=True, timeout=120)
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
