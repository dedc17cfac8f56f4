"""Compiles kernels/csrc into a shared library, once per machine, and finds it again.

    python -m fbitrain.kernels.cpu_build      builds it now, as setup.py does during installation, not on first use

The library lies in $FBITRAIN_KERNEL_CACHE, or $XDG_CACHE_HOME/fbitrain/kernels, or ~/.cache/fbitrain/kernels, under a
name made of the sources, the compiler and the flags: whatever changes, a new file is built. It is built under a lock
and renamed into place, so that several processes may start at once and none ever sees half a file. One that others may
have written, or may have put into its folder, is not loaded.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
CACHE_VARIABLE = "FBITRAIN_KERNEL_CACHE"
COMPILERS = ("g++", "clang++", "c++")

# No -march anywhere: a file gets the instructions that its name says, and is entered only where the CPU has them.
# Contraction is off because a fused multiply-add rounds differently from the reference.
# C++17 and one of GNU's extensions to it, designated initialisers: C++20 would need GCC 10 or Clang 10.
FLAGS = ("-std=gnu++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread")
BASELINE = (
    "linear_calls.cpp",
    "binary_linear.cpp",
    "tokens.cpp",
    "salient.cpp",
    "xnor_gemm.cpp",
    "transpose_signs.cpp",
    "interleave.cpp",
    "kernel_sets.cpp",
    "cpu_features.cpp",
    "threads.cpp",
    "portable.cpp",
    "decoder.cpp",
    "attention.cpp",
    "head.cpp",
    "head_screen.cpp",
    "dense_math.cpp",
)
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (*(f"-mavx512{part}" for part in ("f", "dq", "bw", "vl", "vnni", "vpopcntdq")), "-mgfni"),
    "amx": ("-mavx512f", "-mavx512bw", "-mamx-tile", "-mamx-int8"),
    # Sums of products of floats, which no reference has to be matched bit for bit in.
    "dense_math_avx2": ("-mavx2", "-mfma", "-mf16c", "-ffp-contract=fast"),
    "dense_math_avx512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-ffp-contract=fast"),
}


_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class BuildError(RuntimeError):
    """The library cannot be had: one sentence that says why and what to do."""


def cache_folder() -> Path:
    """Where libraries are kept; it need not exist."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fbitrain" / "kernels"


def find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, or the first of COMPILERS on PATH. Raises BuildError."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"there is no C++ compiler ({', '.join(COMPILERS)}) on PATH; install one or set CXX")


def build() -> Path:
    """The library for this machine, compiled if the cache does not hold it. Raises BuildError."""
    compiler = find_compiler()
    folder = cache_folder()
    library = folder / f"cpu-{_fingerprint(compiler)}.so"
    if library.exists():
        _require_own(folder)
        _require_own(library)
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_own(folder)
        # A link in the lock's place would have its target opened for writing.
        with os.fdopen(os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed
            if not library.exists():
                with tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
                    _compile(compiler, Path(scratch), library)
    except OSError as error:
        raise BuildError(f"the kernels cannot be built in {folder}: {error.strerror}; set {CACHE_VARIABLE}") from error
    _require_own(library)
    return library


def _require_own(path: Path) -> None:
    """Whoever can write the library, or replace it in its folder, runs code in our name."""
    about = path.stat()
    if about.st_uid not in (0, os.geteuid()):
        why = f"belongs to user {about.st_uid}"
    elif about.st_mode & _WRITABLE_BY_OTHERS:
        why = f"can be written by others (mode {stat.S_IMODE(about.st_mode):o})"
    else:
        return
    mend = "`chmod go-w` it" if path.is_dir() else "delete it"
    raise BuildError(
        f"{path} {why}, so no kernel is loaded from it; {mend}, or set {CACHE_VARIABLE} to a folder of your own"
    )


def _fingerprint(compiler: list[str]) -> str:
    version = _run([*compiler, "--version"])
    digest = hashlib.sha256(repr((compiler, version, FLAGS, INSTRUCTION_SETS, platform.machine())).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(f"{source.name}\0".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _compile(compiler: list[str], scratch: Path, library: Path) -> None:
    """Objects one by one, then the library under a temporary name, then its own."""
    compiled: list[str] = []
    if platform.machine() == "x86_64":
        compiled = [name for name in INSTRUCTION_SETS if _compiles(compiler, name, scratch)]
    defines = [f"-DFBITRAIN_{name.upper()}" for name in compiled]
    for source in BASELINE:
        _run([*compiler, *FLAGS, *defines, "-c", str(SOURCES / source), "-o", str(scratch / f"{source}.o")])
    linked = scratch / library.name
    _run([*compiler, "-shared", "-pthread", *map(str, sorted(scratch.glob("*.o"))), "-o", str(linked)])
    linked.chmod(linked.stat().st_mode & ~_WRITABLE_BY_OTHERS)  # whatever the umask allows
    with open(linked, "rb") as file:
        os.fsync(file.fileno())
    linked.replace(library)


def _compiles(compiler: list[str], name: str, scratch: Path) -> bool:
    """Compiles the file of one instruction set; an old compiler may not know it, and the others still serve."""
    command = [*compiler, *FLAGS, *INSTRUCTION_SETS[name], "-c", str(SOURCES / f"{name}.cpp")]
    try:
        _run([*command, "-o", str(scratch / f"{name}.cpp.o")])
    except BuildError:
        return False
    return True


def _run(command: list[str]) -> str:
    """What the command prints. Raises BuildError with its first complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BuildError(f"the C++ compiler {command[0]} cannot be run ({error.strerror}); set CXX") from error
    if done.returncode:
        lines = (
            [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no output"]
        )
        raise BuildError(f"the C++ compiler failed ({shlex.join(command[:1])}: {lines[0].strip()}); set CXX to another")
    return done.stdout


if __name__ == "__main__":
    try:
        print(f"the kernels are in {build()}")
    except BuildError as error:
        print(f"the kernels are not built: {error}")
