"""The tables of docs/hardware.md are what the estimate says today."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fbitrain.config import Config, load_config
from fbitrain.model.size import ParameterCount, count_parameters
from fbitrain.planning.estimate import TeacherSize, rank_memory, tokens_in_total
from fbitrain.utilization import PEAK_TFLOPS, flops_per_token

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
MFU = 0.4
GB = 1e9
NAMES = ("binary_130m", "binary_1.3b", "binary_7b")


def rows(n_columns: int) -> list[list[str]]:
    """The rows of the tables of `n_columns` that begin with a configuration."""
    lines = re.findall(r"^\| `.*\|$", PAGE, re.MULTILINE)
    found = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in found if len(row) == n_columns]


def configuration(name: str, override: str = "", ranks: int = 1) -> tuple[Config, ParameterCount]:
    path = ROOT / "launch" / "configs" / f"{name}.yaml"
    config = load_config(path, [override] if override else [], world_size=ranks)
    return config, count_parameters(config.model, config.binarize)


def teacher() -> TeacherSize:
    """LLaMA-2-7B: the student of the 7B recipe without scales."""
    config, count = configuration("binary_7b")
    size = TeacherSize(count.total - count.scales, config.model.d_model)
    assert f"{size.n_parameters:,} parameters" in PAGE
    return size


def flops(name: str) -> tuple[float, float, int]:
    """FLOPs of a token for student and teacher, and the tokens of the run."""
    config, count = configuration(name)
    head = config.model.vocab_size * config.model.d_model
    student = flops_per_token(config, count.binary + count.dense + head, 0)
    return student, 2.0 * teacher().n_parameters, tokens_in_total(config)


@pytest.mark.parametrize("row", rows(9), ids=" ".join)
def test_memory(row: list[str]) -> None:
    name, ranks, override, *cells = row
    config, count = configuration(name, override, int(ranks))
    found = rank_memory(
        config,
        count.total,
        n_muon=count.binary + count.dense,
        world_size=int(ranks),
        precision=config.engine.precision,
        teacher=teacher(),
    )
    other = found.buckets + found.loss + found.runtime
    parts = (found.weights + found.gradients, found.optimizer, found.activations, found.teacher, other, found.on_device)
    assert [f"{part / GB:.1f}" for part in parts] == cells


def test_memory_of_a_host() -> None:
    needed = []
    for name in NAMES:
        config, count = configuration(name, ranks=8)
        muon = count.binary + count.dense
        precision = config.engine.precision
        found = rank_memory(config, count.total, n_muon=muon, world_size=8, precision=precision, teacher=teacher())
        needed.append(f"{8 * found.on_host(on_gpu=True) / GB:.0f} GB")
    assert f"| host memory of a node with 8 GPUs | {' | '.join(needed)} |" in PAGE


@pytest.mark.parametrize("row", rows(6), ids=" ".join)
def test_time(row: list[str]) -> None:
    name, *cells, gpus, days = row
    student, of_teacher, tokens = flops(name)
    total = (student + of_teacher) * tokens
    assert cells == [f"{student / 1e9:.2f}·10⁹", f"{of_teacher / 1e9:.2f}·10⁹", f"{total / 1e22:.2f}·10²²"]
    assert days == f"{total / (int(gpus) * PEAK_TFLOPS['H100'] * 1e12 * MFU) / 86400:.0f}"


@pytest.mark.parametrize("gpu", ["H100", "A100"])
def test_days_of_one_gpu(gpu: str) -> None:
    days = [sum(flops(name)[:2]) * flops(name)[2] / (PEAK_TFLOPS[gpu] * 1e12 * MFU) / 86400 for name in NAMES]
    assert f"| {gpu} days, at 40 % MFU | {' | '.join(f'{n:,.0f}' for n in days)} |" in PAGE


def test_every_recipe_has_rows() -> None:
    assert {row[0] for row in rows(9)} == {row[0] for row in rows(6)} == set(NAMES)
