"""The element-wise work of the distillation loss on a few rows of logits at a time (fbitrain.distill)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fbitrain.targets.sparse import SparseTargets
from fbitrain.targets.tiles import tile_rows


class Stats(NamedTuple):
    """Per token, fp32 [M]; all but label_ce stay 0 without a teacher. The names and order are DistillMetrics'."""

    kd: Tensor
    teacher_entropy: Tensor
    label_ce: Tensor
    teacher_label_ce: Tensor
    top1_agreement: Tensor

    def rows(self, rows: slice) -> Stats:
        return Stats(*(stat[rows] for stat in self))


@dataclass(frozen=True)
class Terms:
    kd_weight: float
    ce_weight: float
    temperature: float
    chunk_tokens: int

    @property
    def weight(self) -> float:
        return self.kd_weight + self.ce_weight

    @property
    def kd_share(self) -> float:
        return self.kd_weight / self.weight


class Tiles:
    """The element-wise work on a chunk of logits, a few rows at a time, with scratch memory kept between chunks."""

    def __init__(self, terms: Terms, chunk: int, vocab: int, device: torch.device, *, want_gradient: bool) -> None:
        self.n_rows = max(1, min(tile_rows(vocab, device), chunk))
        self.terms = terms
        self.want_gradient = want_gradient
        # Two softmaxes, and fp32 copies of logits that come in another dtype.
        self.q_RV, self.p_RV, self.s_RV, self.t_RV = torch.empty(
            4, self.n_rows, vocab, dtype=torch.float32, device=device
        )

    def run(self, s_CV: Tensor, t_CV: Tensor | SparseTargets | None, labels_C: Tensor, stats: Stats) -> None:
        """Fills the chunk's statistics, and writes the gradient of the loss / terms.weight over the logits `s_CV`."""
        for start in range(0, len(s_CV), self.n_rows):
            rows = slice(start, start + self.n_rows)
            label_R1 = labels_C[rows].clamp(min=0).unsqueeze(1)  # an ignored label must be an index, its weight is 0
            teacher = t_CV.rows(rows) if isinstance(t_CV, SparseTargets) else None if t_CV is None else t_CV[rows]
            self._tile(s_CV[rows], teacher, label_R1, stats.rows(rows))

    def _tile(
        self, gradient_RV: Tensor, teacher: Tensor | SparseTargets | None, label_R1: Tensor, stats: Stats
    ) -> None:
        n = len(gradient_RV)
        s_RV, q_RV = _as_fp32(gradient_RV, self.s_RV[:n]), self.q_RV[:n]
        top_R, lse_R = _softmax(s_RV, out=q_RV)
        stats.label_ce.copy_(lse_R - s_RV.gather(1, label_R1).squeeze(1))
        if isinstance(teacher, SparseTargets):
            self._sparse(gradient_RV, s_RV, teacher, label_R1, lse_R, stats)
            return
        if teacher is None:
            if self.want_gradient:
                gradient_RV.copy_(_subtract_at(q_RV, label_R1, 1.0))
            return
        t_RV, p_RV = _as_fp32(teacher, self.t_RV[:n]), self.p_RV[:n]
        teacher_top_R, teacher_lse_R = _softmax(t_RV, out=p_RV)
        stats.teacher_label_ce.copy_(teacher_lse_R - t_RV.gather(1, label_R1).squeeze(1))
        # An argmax is ten times slower than a maximum on a CPU, so ask: is the teacher's best also the student's best?
        best_R = torch.where(t_RV == teacher_top_R.unsqueeze(1), s_RV, -torch.inf).amax(dim=1)
        stats.top1_agreement.copy_(best_R == top_R)
        if self.terms.temperature != 1:
            self._tempered(gradient_RV, s_RV, t_RV, label_R1, stats)
            return
        stats.kd.copy_(lse_R - torch.linalg.vecdot(p_RV, s_RV))
        stats.teacher_entropy.copy_(teacher_lse_R - torch.linalg.vecdot(p_RV, t_RV))
        if self.want_gradient:  # of the mixture: kd_share · (q − p) + (1 − kd_share) · (q − label)
            _subtract_at(q_RV, label_R1, 1.0 - self.terms.kd_share)
            torch.sub(q_RV, p_RV, alpha=self.terms.kd_share, out=gradient_RV)

    def _sparse(
        self,
        gradient_RV: Tensor,
        s_RV: Tensor,
        targets: SparseTargets,
        label_R1: Tensor,
        lse_R: Tensor,
        stats: Stats,
    ) -> None:
        """Targets of few words, with weights w that sum to W: CE is W · lse − Σ w · s, its gradient W · q − Σ w · e.

        The scratch q holds softmax(s). What needs a whole distribution stays 0: entropy, CE of the label, top 1.
        """
        share, q_RV = self.terms.kd_share, self.q_RV[: len(s_RV)]
        place_E, weights_E, label_weights_R = targets.places(), targets.weights_E, targets.label_weights_M
        word_E = place_E * s_RV.shape[1] + targets.ids_E  # in the flattened rows
        total_R = label_weights_R.index_add(0, place_E, weights_E)
        drawn_R = torch.zeros_like(total_R).index_add_(0, place_E, weights_E * s_RV.view(-1)[word_E])
        stats.kd.copy_(total_R * lse_R - drawn_R - label_weights_R * s_RV.gather(1, label_R1).squeeze(1))
        if self.want_gradient:  # of the mixture: kd_share · (W · q − Σ w · e) + (1 − kd_share) · (q − label)
            q_RV.mul_((share * total_R + (1.0 - share)).unsqueeze(1))
            q_RV.view(-1).index_add_(0, word_E, weights_E, alpha=-share)
            q_RV.scatter_add_(1, label_R1, -(share * label_weights_R + (1.0 - share)).unsqueeze(1))
            gradient_RV.copy_(q_RV)

    def _tempered(self, gradient_RV: Tensor, s_RV: Tensor, t_RV: Tensor, label_R1: Tensor, stats: Stats) -> None:
        """The distillation term at τ ≠ 1. The scratch q holds softmax(s); s, t and p are overwritten."""
        tau, share = self.terms.temperature, self.terms.kd_share
        q_RV, p_RV = self.q_RV[: len(s_RV)], self.p_RV[: len(s_RV)]
        s_RV.div_(tau)
        t_RV.div_(tau)
        _, teacher_lse_R = _softmax(t_RV, out=p_RV)
        stats.teacher_entropy.copy_(teacher_lse_R - torch.linalg.vecdot(p_RV, t_RV)).mul_(tau**2)
        tempered_q_RV = t_RV  # the teacher's logits have done their part
        _, lse_R = _softmax(s_RV, out=tempered_q_RV)
        stats.kd.copy_(lse_R - torch.linalg.vecdot(p_RV, s_RV)).mul_(tau**2)
        if self.want_gradient:  # of the mixture: kd_share · τ · (q_τ − p_τ) + (1 − kd_share) · (q − label)
            tempered_q_RV.sub_(p_RV).mul_(share * tau)
            if share < 1:
                tempered_q_RV.add_(_subtract_at(q_RV, label_R1, 1.0), alpha=1.0 - share)
            gradient_RV.copy_(tempered_q_RV)


def _as_fp32(logits_RV: Tensor, scratch_RV: Tensor) -> Tensor:
    return logits_RV if logits_RV.dtype == torch.float32 else scratch_RV.copy_(logits_RV)


def _softmax(logits_RV: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the softmax to `out`; returns the logits' maxima [R] and logsumexp [R] without a second exponential."""
    torch.softmax(logits_RV, dim=1, out=out)
    top_R = logits_RV.amax(dim=1)
    return top_R, top_R - out.amax(dim=1).log()  # the largest probability is 1 / Σ exp(logit − top)


def _subtract_at(rows_RV: Tensor, index_R1: Tensor, amount: float) -> Tensor:
    """Subtracts `amount` from one element of each row, in place."""
    return rows_RV if amount == 0 else rows_RV.scatter_(1, index_R1, rows_RV.gather(1, index_R1) - amount)
