"""The loss on targets of few words: against its definition, and in expectation over draws against the whole softmax."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fbitrain.distill import distill_loss
from fbitrain.targets.sparse import SparseTargets

V, D = 37, 12


def sparse(rows: list[dict[int, float]], label_weights: list[float] | None = None) -> SparseTargets:
    """Of word -> weight per token."""
    return SparseTargets(
        torch.tensor(list(itertools.accumulate(map(len, rows))), dtype=torch.int64),
        torch.tensor([word for row in rows for word in row], dtype=torch.int64),
        torch.tensor([weight for row in rows for weight in row.values()], dtype=torch.float32),
        torch.tensor(label_weights or [0.0] * len(rows)),
    )


def student(n_tokens: int, vocab: int = V, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_tokens)
    hidden_MD, head_VD = torch.randn(n_tokens, D, generator=generator), torch.randn(vocab, D, generator=generator)
    labels_M = torch.randint(0, vocab, (n_tokens,), generator=generator)
    return hidden_MD.to(dtype).requires_grad_(), head_VD.to(dtype).requires_grad_(), labels_M


def gradients(loss: Tensor, *of: Tensor) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, of)]


def some_targets(n_tokens: int) -> tuple[list[dict[int, float]], list[float]]:
    """Of no word, of one, of many; weights that do not sum to 1."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for token in range(n_tokens):
        words = torch.randperm(V, generator=generator)[: (0, 1, 5, V)[token % 4]].tolist()
        rows.append({word: float(torch.rand((), generator=generator)) for word in sorted(words)})
    return rows, [float(token % 3 == 0) * 0.25 for token in range(n_tokens)]


@pytest.mark.parametrize("chunk_tokens", [1, 7, 512])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), [(1.0, 0.0), (0.6, 0.9)])
def test_it_is_the_cross_entropy_with_the_weights(
    chunk_tokens: int, kd_weight: float, ce_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fbitrain.targets.tiles._CPU_TILE_ELEMENTS", 3 * V)
    hidden, head, labels = student(23)
    labels[[4, 11]] = -100
    rows, label_weights = some_targets(23)
    loss, metrics = distill_loss(
        *(hidden, head, labels, None, None),
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        chunk_tokens=chunk_tokens,
        targets=sparse(rows, label_weights),
    )
    log_q = (hidden.double() @ head.double().t()).log_softmax(1)
    total, kd = torch.zeros((), dtype=torch.float64), 0.0
    for token in range(23):
        if labels[token] < 0:
            continue
        own = -sum((weight * log_q[token, word] for word, weight in rows[token].items()), torch.zeros(()))
        own = own - label_weights[token] * log_q[token, labels[token]]
        total = total + kd_weight * own - ce_weight * log_q[token, labels[token]]
        kd += float(own.detach())
    torch.testing.assert_close(loss.double(), total / 21, rtol=1e-5, atol=1e-6)
    assert float(metrics.kd) == pytest.approx(kd, rel=1e-5)
    assert float(metrics.teacher_entropy) == float(metrics.top1_agreement) == 0
    for ours, exact in zip(gradients(loss, hidden, head), gradients(total / 21, hidden, head), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


def full(hidden: Tensor, head: Tensor, labels: Tensor, probabilities: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The whole distribution, as a teacher whose hidden states are its logits."""
    loss, _ = distill_loss(hidden, head, labels, probabilities.log(), torch.eye(probabilities.shape[1]))
    return loss.detach(), gradients(loss, hidden, head)


@pytest.mark.parametrize("proposal", [1.0, 1.7])
def test_the_expectation_over_draws_is_the_whole_distillation(proposal: float) -> None:
    """Every outcome of N draws from a small vocabulary, each with its probability."""
    vocab, n = 4, 3
    hidden, head, labels = student(1, vocab)
    logits = torch.tensor([[1.3, -0.2, 0.4, -2.0]])
    p, drawn_from = logits.softmax(1)[0], (logits / proposal).softmax(1)[0]
    expected = [torch.zeros_like(hidden, dtype=torch.float64), torch.zeros_like(head, dtype=torch.float64)]
    expected_loss = 0.0
    for outcome in itertools.product(range(vocab), repeat=n):
        chance = float(torch.prod(drawn_from[list(outcome)].double()))
        row = {w: outcome.count(w) / n * float(p[w] / drawn_from[w]) for w in sorted(set(outcome))}
        loss, _ = distill_loss(hidden, head, labels, None, None, targets=sparse([row]))
        expected_loss += chance * float(loss.detach())
        for total, gradient in zip(expected, gradients(loss, hidden, head), strict=True):
            total += chance * gradient
    whole_loss, whole = full(hidden, head, labels, p.unsqueeze(0))
    assert expected_loss == pytest.approx(float(whole_loss), rel=1e-5)
    for total, gradient in zip(expected, whole, strict=True):
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6)


def test_all_words_with_their_probabilities_are_the_whole_distillation() -> None:
    hidden, head, labels = student(9)
    p = torch.randn(9, V, generator=torch.Generator().manual_seed(1)).softmax(1)
    rows = [dict(enumerate(row.tolist())) for row in p]
    loss, _ = distill_loss(hidden, head, labels, None, None, targets=sparse(rows))
    whole_loss, whole = full(hidden, head, labels, p)
    torch.testing.assert_close(loss.detach(), whole_loss)
    for ours, exact in zip(gradients(loss, hidden, head), whole, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)


def test_bf16_is_the_same_within_its_rounding() -> None:
    rows, label_weights = some_targets(16)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, head, labels = student(16, dtype=dtype)
        loss, _ = distill_loss(hidden, head, labels, None, None, targets=sparse(rows, label_weights))
        losses.append((float(loss.detach()), *gradients(loss, hidden, head)))
    (exact, *exact_gradients), (rounded, *rounded_gradients) = losses
    assert rounded == pytest.approx(exact, rel=2e-2)
    for a, b in zip(exact_gradients, rounded_gradients, strict=True):
        assert 20 * torch.log10(a.norm() / (a - b).norm()) > 30


def test_no_target_is_no_loss() -> None:
    hidden, head, labels = student(5)
    loss, _ = distill_loss(hidden, head, labels, None, None, targets=SparseTargets.none(5))
    assert float(loss.detach()) == 0
    assert not any(gradient.any() for gradient in gradients(loss, hidden, head))


def test_what_does_not_fit_is_refused() -> None:
    hidden, head, labels = student(5)
    with pytest.raises(ValueError, match="4 targets for 5 tokens"):
        distill_loss(hidden, head, labels, None, None, targets=SparseTargets.none(4))
    with pytest.raises(ValueError, match="temperature 2"):
        distill_loss(hidden, head, labels, None, None, targets=SparseTargets.none(5), temperature=2.0)
