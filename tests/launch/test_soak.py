"""The harness of faults itself, with two of its kinds; the whole of it is `python -m tests.launch.soak`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.soak.network import why_not

pytestmark = [pytest.mark.launch, pytest.mark.slow]


@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_a_killed_rank_and_a_node_that_is_cut_off(tmp_path: Path) -> None:
    kinds = ("rank killed", "node cut off, later returned")
    done = subprocess.run(
        [sys.executable, "-m", "tests.launch.soak", "--times", "1", "--folder", str(tmp_path), "--kinds", *kinds],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 lost, 0 too many" in done.stdout
