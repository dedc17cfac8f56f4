"""Building the kernels: once, whole, under a lock; and what happens where they cannot be built."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from fbitrain.kernels import cpu, cpu_build, dispatch, reference
from fbitrain.kernels.cpu_build import BuildError, build, cache_folder
from fbitrain.kernels.dispatch import Call, select_backend

try:
    cpu_build.find_compiler()
except BuildError as reason:
    pytest.skip(f"the build of the kernels is not tested: {reason}", allow_module_level=True)

LINK = """#!/bin/bash
# A compiler that takes no time: it writes its name into the output, and its arguments into a log.
[[ $1 == --version ]] && { echo "stand-in 1.0"; exit; }
echo "$@" >>"$LOG"
while [[ $# -gt 1 ]]; do [[ $1 == -o ]] && echo built >"$2"; shift; done
sleep "${PAUSE:-0}"
"""


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the C++ compiler; returns the log of its calls."""
    script, log = tmp_path / "compiler.sh", tmp_path / "calls.log"
    script.write_text(LINK)
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("LOG", str(log))
    return log


@pytest.fixture
def forgotten() -> object:
    """Nothing is remembered of libraries and choices, before and after the test."""
    caches = (cpu._library, cpu.levels, dispatch._remembered)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "FBITRAIN_KERNEL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder() == tmp_path / ".cache" / "fbitrain" / "kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/fbitrain/kernels")
    monkeypatch.setenv("FBITRAIN_KERNEL_CACHE", "/own")
    assert cache_folder() == Path("/own")


def test_a_built_library_is_found_again(empty_cache: Path, compiler: Path) -> None:
    library = build()
    n_calls = len(compiler.read_text().splitlines())
    assert library.read_text() == "built\n"
    assert build() == library
    assert len(compiler.read_text().splitlines()) == n_calls
    assert sorted(path.name for path in empty_cache.iterdir()) == sorted([library.name, "lock"])


def test_other_flags_or_sources_are_another_library(
    empty_cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    libraries = {build()}
    monkeypatch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, "-g"))
    libraries.add(build())
    sources = tmp_path / "csrc"
    sources.mkdir()
    for source in cpu_build.SOURCES.iterdir():
        (sources / source.name).write_bytes(source.read_bytes())
    (sources / "kernels.h").write_text("// changed\n")
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    libraries.add(build())
    assert len(libraries) == 3


def test_no_file_but_its_own_gets_the_instructions_of_a_set(empty_cache: Path, compiler: Path) -> None:
    build()
    for line in compiler.read_text().splitlines():
        instructions = [word for word in line.split() if word.startswith("-m")]
        names = [name for name in cpu_build.INSTRUCTION_SETS if f"/{name}.cpp " in line]
        flags = [flag for name in names for flag in cpu_build.INSTRUCTION_SETS[name]]
        assert instructions == [flag for flag in flags if flag.startswith("-m")]


def test_the_command_builds_or_says_why_not(empty_cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def say() -> str:
        command = [sys.executable, "-m", "fbitrain.kernels.cpu_build"]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    assert say() == f"the kernels are in {next(empty_cache.glob('cpu-*.so'))}\n"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert say().startswith("the kernels are not built: the C++ compiler no-such-compiler cannot be run")


def test_installing_builds_and_goes_on_without_a_compiler(
    empty_cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    folder = ["--build-lib", str(tmp_path / "installed"), "egg_info", "--egg-base", str(tmp_path)]
    command = [sys.executable, "setup.py", "-q", "build_py", *folder]
    subprocess.run(command, cwd=root, check=True, timeout=60, capture_output=True)
    assert next(empty_cache.glob("cpu-*.so")) == build()
    assert (tmp_path / "installed" / "fbitrain" / "kernels" / "csrc" / "avx2.cpp").is_file()
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = subprocess.run(command, cwd=root, check=True, timeout=60, capture_output=True, text=True)
    assert "the kernels are not built: the C++ compiler no-such-compiler cannot be run" in done.stdout


def test_two_processes_build_once(empty_cache: Path, compiler: Path) -> None:
    command = [sys.executable, "-c", "from fbitrain.kernels.cpu_build import build; print(build())"]
    environment = {**os.environ, "PAUSE": "0.05"}
    start = time.monotonic()
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    libraries = {process.communicate(timeout=60)[0].strip() for process in both}
    assert time.monotonic() - start < 60
    assert libraries == {str(build())}
    outputs = [line for line in compiler.read_text().splitlines() if "-shared" in line]
    assert len(outputs) == 1


def test_an_old_compiler_leaves_out_what_it_does_not_know(
    empty_cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(os.environ["CXX"])
    script.write_text(
        LINK.replace('echo "$@"', '[[ $* == *-mamx* ]] && { echo "error: no -mamx" >&2; exit 1; }\necho "$@"')
    )
    build()
    linked = next(line for line in compiler.read_text().splitlines() if "-shared" in line)
    assert "amx.cpp.o" not in linked
    assert "portable.cpp.o" in linked
    if cpu_build.platform.machine() == "x86_64":
        assert "avx512.cpp.o" in linked
        assert "-DFBITRAIN_AVX512" in compiler.read_text()
        assert "-DFBITRAIN_AMX" not in compiler.read_text()


def check_fallback(message: str) -> None:
    """The ops run in plain torch and say why, once."""
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    call = Call("pack_signs", "cpu", w.dtype)
    with pytest.warns(RuntimeWarning, match=message):
        words = dispatch.runner(call)(w)
    assert torch.equal(words, reference.pack_signs(w))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(dispatch.runner(call._replace(dtype=torch.float64))(w.double()), words)
    choice = select_backend(Call("binary_linear", "cpu", torch.float32))
    assert choice.backend == "reference"


@pytest.mark.usefixtures("forgotten", "empty_cache")
def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    check_fallback("there is no C\\+\\+ compiler")
    monkeypatch.setenv("FBITRAIN_BACKEND", "portable")
    with pytest.raises(dispatch.BackendError, match=r"cannot run xnor_gemm.*there is no C\+\+ compiler"):
        select_backend(Call("xnor_gemm", "cpu", torch.int32))


@pytest.mark.usefixtures("forgotten", "empty_cache", "compiler")
def test_with_a_broken_compiler_the_reference_runs() -> None:
    Path(os.environ["CXX"]).write_text(
        '#!/bin/bash\n[[ $1 == --version ]] || { echo "fatal error: no" >&2; exit 1; }\n'
    )
    check_fallback(r"the C\+\+ compiler failed .*fatal error: no")


@pytest.mark.usefixtures("forgotten", "empty_cache")
def test_with_a_compiler_that_is_not_there_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++ -v")
    check_fallback("/nowhere/g\\+\\+ cannot be run")


@pytest.mark.usefixtures("forgotten", "compiler")
def test_a_library_that_cannot_be_loaded_is_named(empty_cache: Path) -> None:
    check_fallback(f"{empty_cache}.*cannot be loaded")


@pytest.mark.usefixtures("forgotten", "compiler")
def test_with_a_cache_that_cannot_be_written_the_reference_runs(empty_cache: Path) -> None:
    empty_cache.write_text("a file where the folder should be")  # permissions would not stop root
    check_fallback(f"cannot be built in {empty_cache}.*set FBITRAIN_KERNEL_CACHE")


@pytest.mark.usefixtures("compiler")
def test_a_read_only_cache_that_holds_the_library_is_enough(empty_cache: Path) -> None:
    library = build()
    (empty_cache / "lock").unlink()
    empty_cache.chmod(0o500)
    try:
        assert build() == library
        assert not (empty_cache / "lock").exists()
    finally:
        empty_cache.chmod(0o700)


@pytest.mark.usefixtures("compiler", "empty_cache")
def test_a_library_that_others_can_write_is_not_loaded() -> None:
    library = build()
    for mode in (0o757, 0o775):
        library.chmod(mode)
        with pytest.raises(
            BuildError,
            match=f"{library} can be written by others .mode {mode:o}., so no kernel is loaded from it; delete it",
        ):
            build()
    library.chmod(0o755)
    assert build() == library


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("built", [False, True])
def test_nothing_is_loaded_from_a_folder_that_others_can_write(empty_cache: Path, built: bool) -> None:
    if built:
        build()
    empty_cache.mkdir(exist_ok=True)
    empty_cache.chmod(0o777)
    with pytest.raises(
        BuildError,
        match=f"{empty_cache} can be written by others .mode 777., so no kernel is loaded from it; `chmod go-w` it",
    ):
        build()


@pytest.mark.usefixtures("compiler")
def test_a_link_in_the_locks_place_is_not_followed(empty_cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    empty_cache.mkdir(exist_ok=True, mode=0o700)
    (empty_cache / "lock").symlink_to(target)
    with pytest.raises(BuildError, match="cannot be built"):
        build()
    assert target.read_text() == "mine"


@pytest.mark.usefixtures("compiler", "empty_cache")
def test_a_library_of_another_user_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    library = build()
    if os.geteuid():
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        os.chown(library, 12345, -1)
    with pytest.raises(BuildError, match=r"belongs to user \d+, so no kernel is loaded from it"):
        build()


@pytest.mark.usefixtures("compiler", "empty_cache")
def test_a_lax_umask_gives_nobody_the_library() -> None:
    before = os.umask(0)
    try:
        assert not build().stat().st_mode & 0o022
    finally:
        os.umask(before)


def test_a_build_that_fails_leaves_nothing(empty_cache: Path, compiler: Path) -> None:
    script = Path(os.environ["CXX"])
    script.write_text(
        LINK.replace('echo "$@"', '[[ $* == *-shared* ]] && { echo "error: full" >&2; exit 1; }\necho "$@"')
    )
    with pytest.raises(BuildError, match="error: full"):
        build()
    assert [path.name for path in empty_cache.iterdir()] == ["lock"]
