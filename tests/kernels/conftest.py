"""Shared by the kernel tests: each CPU level that this machine runs, and an empty cache of compiled kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbitrain.kernels import cpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`level` stands for each level in turn; test_cpu.test_this_machine_runs says which are left out, and why."""
    if "level" in metafunc.fixturenames and metafunc.function.__name__ != "test_this_machine_runs":
        metafunc.parametrize("level", [name for name, why_not in cpu.levels().items() if not why_not])


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """FBITRAIN_KERNEL_CACHE, set to a folder that does not exist yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FBITRAIN_KERNEL_CACHE", str(folder))
    return folder
