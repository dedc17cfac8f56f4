"""Say what this machine has and whether a run fits it: `doctor.py [--config YAML [section.key=value ...]]`.

With --picture FILE.png it also draws the schedules of the run.

Exit code 1 if the run cannot work here, or without --config what needs no extra; every reason is one sentence on
stderr.
Nothing outside the standard library is imported before the packages are known to be there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from fbitrain.base.command import positive
from fbitrain.base.extras import missing

GB = 1e9
TOOLS = ("g++", "clang++", "nvcc", "ninja")


def main(arguments: argparse.Namespace) -> int:
    extras = ["train"] if arguments.config or not missing("train") else []
    problems = missing_packages(extras)
    if not problems:
        problems = inspect(arguments)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


def missing_packages(extras: Sequence[str]) -> list[str]:
    """One sentence per requirement of fbitrain and its `extras` that is not installed, or not in a version it is
    written for."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return ["packaging is not installed; run ./quickstart.sh, or pip install fbitrain"]
    problems = []
    for requirement in map(Requirement, metadata.requires("fbitrain") or []):
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed; run ./quickstart.sh, or pip install '{requirement}'")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{requirement.name} {version} is installed, but fbitrain is written for {requirement}")
    return problems


def inspect(arguments: argparse.Namespace) -> list[str]:
    """Prints what is here and what the run would take; returns what keeps it from running."""
    from fbitrain.base.errors import UserError
    from fbitrain.config import load_config

    config = None
    if arguments.picture and not arguments.config:
        raise UserError("--picture draws the schedules of a run; name the run with --config")
    if arguments.config:  # checked before torch is imported: a mistyped key is reported at once
        config = load_config(arguments.config, arguments.overrides, world_size=arguments.world_size)
    n_gpus = print_machine()
    problems = print_kernels(n_gpus)
    if config is None:
        return problems
    from fbitrain.planning.preflight import inspect_run
    from fbitrain.planning.schedule_picture import draw_schedules

    ranks_here = arguments.ranks_per_node or min(arguments.world_size, n_gpus or arguments.world_size)
    report = inspect_run(config, world_size=arguments.world_size, ranks_here=ranks_here)
    print(f"\n{arguments.config}")
    for label, text in report.lines:
        print_line(label, text)
    if arguments.picture:
        draw_schedules(config, arguments.picture)
        print_line("picture", f"its schedules are drawn in {arguments.picture}")
    return problems + report.problems


def print_machine() -> int:
    """Versions, devices, compilers and free room; returns the number of GPUs."""
    import psutil
    import torch

    from fbitrain.environment import describe

    about = describe(world_size=1)
    commit = f" (commit {about['git_commit'][:12]})" if about["git_commit"] else ""
    print_line("versions", f"fbitrain {about['fbitrain']}{commit}, Python {about['python']}, {about['platform']}")
    print_line("", ", ".join(f"{name} {version}" for name, version in about["packages"].items()))
    n_gpus = torch.cuda.device_count()
    print_devices(n_gpus)
    for extra, what in (("train", "training"), ("serve", "serving")):
        if absent := missing(extra):
            print_line(what, f"no ({', '.join(absent)} not installed; pip install 'fbitrain[{extra}]')")
    print_line("compilers", ", ".join(f"{name}: {tool_version(name) or 'not found'}" for name in TOOLS))
    memory = psutil.virtual_memory()
    print_line("memory", f"{memory.available / GB:.1f} of {memory.total / GB:.1f} GB free")
    print_line("disk", f"{shutil.disk_usage('.').free / GB:.1f} GB free in {os.getcwd()}")
    return n_gpus


def print_devices(n_gpus: int) -> None:
    import torch

    from fbitrain.environment import processor
    from fbitrain.process import native_bf16

    bf16 = "bf16 native" if native_bf16() else "no native bf16: engine.precision=auto computes in fp32"
    print_line("devices", f"{processor()}, {os.cpu_count()} cores" + ("" if n_gpus else f", {bf16}; no GPU"))
    for i in range(n_gpus):
        free, total = torch.cuda.mem_get_info(i)
        print_line("", f"GPU {i}: {torch.cuda.get_device_name(i)}, {free / GB:.1f} of {total / GB:.1f} GB free, {bf16}")


def print_kernels(n_gpus: int) -> list[str]:
    """Which implementation of each binary op would run, and why not the others; returns why one cannot run at all."""
    import torch

    from fbitrain.kernels import cupy_backend
    from fbitrain.kernels.dispatch import OPS, BackendError, Call, select_backend

    device_type, dtype = ("cuda", torch.bfloat16) if n_gpus else ("cpu", torch.float32)
    for i, op in enumerate(OPS):
        try:
            print_line("kernels" if i == 0 else "", str(select_backend(Call(op, device_type, dtype))))
        except BackendError as error:  # of FBITRAIN_BACKEND, which is the same for every op
            return [str(error)]
    reason = cupy_backend.why_not()
    print_line("", f"CUDA kernels: {f'no ({reason})' if reason else 'yes'}")
    return []


def tool_version(name: str) -> str:
    """What a compiler on PATH says its version is; empty if it is not there."""
    path = shutil.which(name)
    if not path:
        return ""
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    release = [line for line in lines if "release" in line]  # nvcc says it in a later line
    return (release or lines or ["found"])[0]


def print_line(label: str, text: str) -> None:
    print(f"{label:<10} {text}")


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(
        prog="fbitrain doctor", description="Say what this machine has and what a run would take."
    )
    commands.add_argument(
        "--config", type=Path, metavar="YAML", help="the run to check: its files, memory and tokens per step"
    )
    commands.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="draw the run's learning rate, weight decay and batch over its steps",
    )
    commands.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    commands.add_argument("--world-size", type=positive, default=1, help="ranks of the run, over all nodes (default 1)")
    commands.add_argument("--ranks-per-node", type=positive, help="ranks on this node (default: one per GPU, or all)")
    return commands
