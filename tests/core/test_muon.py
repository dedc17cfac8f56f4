"""Muon: the orthogonal matrix beside a singular value decomposition, the plan of who computes what, the exchange."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fbitrain.optim.muon import (
    ROUND_ELEMENTS,
    MatrixForm,
    matrix_update,
    orthogonalize,
    plan_updates,
    update_size,
)
from fbitrain.optim.partition import Placement, Share

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (8, 3), (3, 8), (33, 17)]


def svd_of_quintic(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """The independent formulation: the quintic applied to the singular values alone, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / matrix.double().norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_iterates_on_the_singular_values_alone(shape: tuple[int, int], steps: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(steps), dtype=torch.float64)
    assert torch.allclose(orthogonalize(matrix, steps), svd_of_quintic(matrix, steps), atol=1e-9)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6])
def test_size_of_the_gradient_does_not_matter(scale: float) -> None:
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrix * scale, 5)
    assert torch.allclose(found, orthogonalize(matrix, 5), atol=1e-4)
    singular = torch.linalg.svdvals(found)
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(orthogonalize(torch.zeros(4, 6), 5), torch.zeros(4, 6))


def test_sizes_of_an_update() -> None:
    assert update_size(8, 2, "spectral") == 2.0
    assert update_size(2, 8, "spectral") == 1.0
    assert update_size(8, 2, "rms") == pytest.approx(0.2 * math.sqrt(8))
    # rms: an orthogonal matrix of any shape changes its entries by 0.2 in the root mean square.
    for rows, columns in ((64, 16), (16, 64), (32, 32)):
        q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)))[0]
        q = q if rows >= columns else q.T
        assert (q * update_size(rows, columns, "rms")).square().mean().sqrt() == pytest.approx(0.2, rel=1e-4)


def test_fused_matrices_are_orthogonalized_one_by_one() -> None:
    momentum = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
    parts = [orthogonalize(part, 5) * update_size(*part.shape, "spectral") for part in momentum.split([2, 3, 7])]
    fused = MatrixForm(rows=(2, 3, 7))
    assert torch.equal(matrix_update(momentum, fused, 5, "spectral"), torch.cat(parts))
    assert not torch.allclose(matrix_update(momentum, MatrixForm(), 5, "spectral"), torch.cat(parts), atol=1e-2)
    # GPT-2's Conv1D has the same matrices on their side.
    sideways = matrix_update(momentum.T, MatrixForm(rows=(2, 3, 7), transposed=True), 5, "spectral")
    assert torch.equal(sideways, torch.cat(parts).T)


def placed(shape: tuple[int, int], *shares: Share) -> Placement:
    parameter = nn.Parameter(torch.empty(0))
    return Placement(parameter, shape, torch.empty(0), shares)


def test_plan_gives_whole_matrices_to_who_has_them_and_shares_the_rest_out() -> None:
    whole = [placed((8, 8), Share(1, 0, 64, 0)), placed((8, 8), Share(1, 0, 64, 64))]
    cut = [placed((16, 16), Share(0, 0, 128, 0), Share(1, 128, 256, 0)) for _ in range(4)]
    plan = plan_updates([whole[0], *cut, whole[1]], [MatrixForm()] * 6, 2)
    assert [matrix.owner for matrix in plan.local] == [1, 1]
    assert [matrix.placement for matrix in plan.local] == whole
    (matrices,) = plan.rounds  # none of them holds what a rank can do alone
    assert [matrix.placement for matrix in matrices] == cut
    assert [matrix.owner for matrix in matrices].count(0) in (2, 3)  # rank 1 has less room for what is cut


def test_plan_cuts_what_does_not_fit_memory_into_rounds() -> None:
    side = int(math.sqrt(ROUND_ELEMENTS))
    half = side * side // 2
    large = [placed((side, side), Share(0, 0, half, 0), Share(1, half, 2 * half, 0)) for _ in range(5)]
    plan = plan_updates(large, [MatrixForm()] * 5, 2)
    assert [len(each) for each in plan.rounds] == [2, 2, 1]
    assert [matrix.placement for each in plan.rounds for matrix in each] == large
    assert plan.local == ()


# -- the step of two ranks beside that of one -------------------------------------------------------------------------


def run_ranks(folder: Path, kind: str, world_size: int) -> tuple[list[torch.Tensor], float]:
    """The matrices after three steps of muon_ranks.py, and the sum of squares of the last one."""
    out = folder / "matrices.pt"
    script = Path(__file__).with_name("muon_ranks.py")
    subprocess.run([sys.executable, str(script), kind, str(world_size), str(out)], check=True, timeout=120)
    matrices, squares = torch.load(out, weights_only=True)
    return matrices, float(squares)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[torch.Tensor], float]:
    return run_ranks(tmp_path_factory.mktemp("alone"), "buffer", 1)


def test_one_rank_does_what_the_formula_says(alone: tuple[list[torch.Tensor], float]) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.zeros(m.shape, dtype=torch.float64) for m in alone[0]]
    momenta = [torch.zeros(m.shape, dtype=torch.float64) for m in alone[0]]
    for step in range(3):
        lr = 0.1 / (step + 1)
        for i, shape in enumerate([m.shape for m in alone[0]]):
            gradient = torch.randn(shape, generator=generator).double()
            momenta[i] = 0.9 * momenta[i] + 0.1 * gradient
            lookahead = 0.1 * gradient + 0.9 * momenta[i]
            blocks = lookahead.split([2, 3]) if i == 1 else [lookahead]
            update = torch.cat([svd_of_quintic(b, 3) * math.sqrt(max(1, b.shape[0] / b.shape[1])) for b in blocks])
            weights[i] = weights[i] * (1 - lr * 0.05) - lr * update
    for found, wanted in zip(alone[0], weights, strict=True):
        assert torch.allclose(found.double(), wanted, atol=2e-6)


@pytest.mark.parametrize("kind", ["buffer", "pieces"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_share_matrices_do_what_one_does(
    alone: tuple[list[torch.Tensor], float], tmp_path: Path, kind: str, world_size: int
) -> None:
    found, squares = run_ranks(tmp_path, kind, world_size)
    for mine, wanted in zip(found, alone[0], strict=True):
        assert torch.allclose(mine, wanted, atol=2e-6)
    assert squares == pytest.approx(alone[1], rel=1e-4)
