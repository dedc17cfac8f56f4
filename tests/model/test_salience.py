"""Scores against explicit inverses; masks against sorting, with exact counts and ties by index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fbitrain.model.config import CHOLESKY_UP_TO, CRITERIA, HESSIAN_SCORES, SalientConfig
from fbitrain.model.hessian import HessianSum, SingularHessianError, inverse_diagonal, inverse_factor
from fbitrain.model.salience import hessian_scores, magnitude_scores, select_mask


def random_hessian(k: int, n_tokens: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(n_tokens, k, dtype=dtype) @ torch.randn(k, k, dtype=dtype)
    return x.T @ x / n_tokens


def test_the_hessian_is_the_mean_over_all_tokens_whatever_their_shape() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 9)
    total = HessianSum(9)
    total.add(x[:2])
    total.add(x[2:].reshape(-1, 9))
    assert torch.allclose(total.mean(), torch.einsum("bti,btj->ij", x, x) / 30, atol=1e-5)
    assert torch.equal(HessianSum(3).mean(), torch.zeros(3, 3))


@pytest.mark.parametrize("k", [1, 7, 33])
def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse(k: int) -> None:
    torch.manual_seed(k)
    hessian = random_hessian(k, 4 * k)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    factor = inverse_factor(hessian, 0.01)
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-8)
    assert torch.allclose(inverse_diagonal(factor), torch.linalg.inv(damped).diagonal(), rtol=1e-8)


def test_fewer_tokens_than_inputs_and_dead_inputs_are_damped() -> None:
    torch.manual_seed(1)
    hessian = random_hessian(12, 5)
    hessian[3], hessian[:, 3] = 0, 0
    factor = inverse_factor(hessian, 0.01)
    ridge = 0.01 * hessian.diagonal().mean()
    expected = torch.zeros(12, dtype=torch.float64)
    expected[3] = ridge**-0.5
    assert torch.allclose(factor[3], expected)
    assert torch.allclose(factor[:, 3], expected)


def test_damping_grows_where_it_was_too_little() -> None:
    singular = torch.ones(6, 6)
    factor = inverse_factor(singular, 0.0)
    raised = singular + 1e-3 * torch.eye(6)  # the first step from a damping of nothing
    assert torch.allclose(factor.T @ factor @ raised, torch.eye(6), atol=1e-2)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_useless_hessian_is_refused(value: float) -> None:
    with pytest.raises(SingularHessianError, match="no Cholesky factor"):
        inverse_factor(torch.full((4, 4), value), 0.01)


@pytest.mark.parametrize("score", HESSIAN_SCORES)
def test_hessian_scores_order_weights_as_the_papers_formula(score: str) -> None:
    torch.manual_seed(2)
    w, hessian = torch.randn(5, 11), random_hessian(11, 60).float()
    inverse = torch.linalg.inv((hessian + 0.01 * hessian.diagonal().mean() * torch.eye(11)).double())
    # The formula as it is written; and as the published code reads it, where H⁻¹ is kept as its Cholesky factor.
    read_as = inverse if score == "hessian_diagonal" else torch.linalg.cholesky(inverse, upper=True)
    paper = w.double() ** 2 / read_as.diagonal() ** 2
    scores = hessian_scores(w, hessian, 0.01, score)
    assert torch.allclose(scores.double() ** 2, paper, rtol=1e-3)
    assert torch.equal(scores.flatten().argsort(), paper.flatten().argsort())


def test_the_cholesky_score_counts_only_the_columns_that_come_after() -> None:
    torch.manual_seed(4)
    hessian, w = random_hessian(9, 40), torch.ones(1, 9)
    scores = hessian_scores(w, hessian, 0.0, "hessian_cholesky").squeeze(0)
    for k in range(9):
        assert scores[k].item() == pytest.approx(torch.linalg.inv(hessian[k:, k:])[0, 0].item() ** -0.5, rel=1e-4)


def test_hessian_means_the_score_that_is_better_at_the_share() -> None:
    def score(criterion: str, fraction: float, *, feedback: bool = True) -> str:
        return SalientConfig(fraction=fraction, criterion=criterion).hessian_score(feedback=feedback)

    assert [score("hessian", fraction) for fraction in (0.05, 0.1, CHOLESKY_UP_TO)] == 3 * ["hessian_cholesky"]
    assert [score("hessian", fraction) for fraction in (0.2, 0.3, 0.5)] == 3 * ["hessian_diagonal"]
    assert {score("hessian", fraction, feedback=False) for fraction in (0.05, 0.1, 0.5)} == {"hessian_diagonal"}
    assert [score(name, 0.1) for name in HESSIAN_SCORES] == list(HESSIAN_SCORES)
    assert score("magnitude", 0.1) == score("fisher", 0.1) == ""
    assert set(HESSIAN_SCORES) < set(CRITERIA)


def test_magnitude_scores_are_fp32_and_without_graph() -> None:
    w = torch.nn.Parameter(torch.tensor([[-2.0, 0.5]], dtype=torch.bfloat16))
    scores = magnitude_scores(w)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert scores.tolist() == [[2.0, 0.5]]


@given(
    n=st.integers(1, 9),
    k=st.integers(1, 40),
    fraction=st.floats(0.001, 0.999),
    width=st.integers(1, 17),
    levels=st.integers(1, 5),
)
def test_masks_hold_exactly_the_highest_scores(n: int, k: int, fraction: float, width: int, levels: int) -> None:
    scores = torch.randint(levels, (n, k), generator=torch.Generator().manual_seed(n * k)).float()
    for scope, size in (("layer", k), ("group", width)):
        mask = select_mask(scores, fraction, scope, width)
        for start in range(0, k, size):
            block, chosen = scores[:, start : start + size], mask[:, start : start + size]
            order = sorted(range(block.numel()), key=lambda i: (-block.reshape(-1)[i].item(), i))
            assert set(chosen.reshape(-1).nonzero().flatten().tolist()) == set(order[: round(fraction * block.numel())])


def test_by_row_every_row_has_its_share() -> None:
    """CherryQ's code takes the highest of each row, and as many in each."""
    scores = torch.randint(9, (5, 40), generator=torch.Generator().manual_seed(6)).float()
    for row, chosen in zip(scores.tolist(), select_mask(scores, 0.11, "row"), strict=True):
        order = sorted(range(40), key=lambda i: (-row[i], i))
        assert set(chosen.nonzero().flatten().tolist()) == set(order[:4])


def test_a_transposed_weight_has_the_same_mask() -> None:
    scores = torch.rand(6, 10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(select_mask(scores.T.contiguous().T, 0.3), select_mask(scores, 0.3))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_1_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        select_mask(torch.ones(2, 2), fraction)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="scope='column' is unknown"):
        select_mask(torch.ones(2, 2), 0.5, "column")
    with pytest.raises(ValueError, match="group_size=0"):
        select_mask(torch.ones(2, 2), 0.5, "group", 0)
    with pytest.raises(ValueError, match="NaN"):
        select_mask(torch.tensor([[1.0, float("nan")]]), 0.5)
