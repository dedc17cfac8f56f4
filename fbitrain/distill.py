"""Autoregressive distillation (arXiv 2407.07093): the student learns the teacher's whole next-token distribution.

    loss = mean over valid tokens of kd_weight · τ² · CE(softmax(t/τ), softmax(s/τ)) + ce_weight · CE(label, softmax(s))

With a vocabulary of 32k to 128k the logits s and t of all tokens are far larger than the models' activations, so they
never exist together: both heads are applied to a chunk of tokens, the loss and its gradient by the logits are computed
in place, and that gradient is multiplied into the gradients of the hidden states and of the head before the next chunk
overwrites it. The forward pass leaves these two gradients behind; the backward pass only scales them.

Letters: M tokens, V vocabulary, D student width, Dt teacher width, C tokens of a chunk, R tokens of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_LABEL = -100  # tokens with this label count in no term and no metric

# fp32 logits that the element-wise work touches at a time. On a CPU a tile must stay in the core's cache (1 MiB; a
# whole chunk would go through main memory a dozen times); elsewhere it must be large enough to fill the device.
_CPU_TILE_ELEMENTS = 2**18
_DEVICE_TILE_ELEMENTS = 2**24


@dataclass(frozen=True)
class DistillMetrics:
    """Sums over the valid tokens: detached fp32 scalars on the device. Add up batches and ranks, divide by `tokens`.

    kd − teacher_entropy is τ² · KL(teacher ‖ student). Without a teacher its four fields are 0.
    """

    loss: Tensor  # the weighted sum that is trained
    kd: Tensor  # τ² · CE(teacher, student)
    teacher_entropy: Tensor  # τ² · entropy of the teacher's softmax at τ
    label_ce: Tensor  # CE(label, student) at temperature 1, in nats
    teacher_label_ce: Tensor  # CE(label, teacher) at temperature 1, in nats
    top1_agreement: Tensor  # tokens whose likeliest successor is the same for both (equal maxima count as the same)
    tokens: Tensor  # valid tokens
    hidden_mse: Tensor | float = 0.0  # the distance of both models' hidden states (fbitrain.student), times tokens


class _Model(NamedTuple):
    hidden_MD: Tensor
    head_VD: Tensor


class _Stats(NamedTuple):
    """Per token, fp32 [M]; all but label_ce stay 0 without a teacher. The names and order are DistillMetrics'."""

    kd: Tensor
    teacher_entropy: Tensor
    label_ce: Tensor
    teacher_label_ce: Tensor
    top1_agreement: Tensor

    def rows(self, rows: slice) -> _Stats:
        return _Stats(*(stat[rows] for stat in self))


@dataclass(frozen=True)
class _Terms:
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


def distill_loss(
    hidden_MD: Tensor,
    head_VD: Tensor,
    labels_M: Tensor,
    teacher_hidden_MD: Tensor | None,
    teacher_head_VD: Tensor | None,
    *,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
    chunk_tokens: int = 512,
) -> tuple[Tensor, DistillMetrics]:
    """The training loss, a mean over valid tokens (fp32 scalar), and its parts.

    `hidden_MD` [M, D] and `head_VD` [V, D] are the student's, of one floating dtype; they get gradients.
    `teacher_hidden_MD` [M, Dt] and `teacher_head_VD` [V, Dt] may be None when `kd_weight` is 0, and are then not read.
    `labels_M` are token ids (int64 [M]). Tokens labelled -100 count nowhere; with none left, loss and gradients are 0.

    Matrices are multiplied in their own dtype; softmax, losses and the head's gradient over chunks are fp32. Beyond the
    two gradients at most 2 · `chunk_tokens` · V logits exist. Nothing waits for the device. The gradients are computed
    here, and only if gradient mode is on; they can be taken once (a second backward raises RuntimeError).

    Raises ValueError on shapes, dtypes or weights that do not fit together.
    """
    student, teacher = _Model(hidden_MD, head_VD), None
    if kd_weight > 0:
        if teacher_hidden_MD is None or teacher_head_VD is None:
            raise ValueError(f"kd_weight={kd_weight} needs the teacher's hidden states and head")
        teacher = _Model(teacher_hidden_MD.detach(), teacher_head_VD.detach())
    terms = _Terms(kd_weight, ce_weight, temperature, chunk_tokens)
    _check(student, labels_M, teacher, terms)
    # Inside an autograd.Function gradient mode is always off, so what is wanted is decided here.
    wanted = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in student)
    loss, sums = _run(hidden_MD, head_VD, labels_M, teacher, terms, wanted)
    return loss, DistillMetrics(*sums.unbind())


class _DistillLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        head_VD: Tensor,
        labels_M: Tensor,
        teacher: _Model | None,
        terms: _Terms,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        student = _Model(hidden_MD, head_VD)
        valid_M = labels_M != IGNORED_LABEL
        tokens = valid_M.sum(dtype=torch.float32)
        divisor = tokens.clamp(min=1)
        gradients = _Gradients(student, wanted, token_weight_M=valid_M * (terms.weight / divisor))
        stats_M = _over_chunks(student, labels_M, teacher, terms, gradients)

        stat_sums = torch.where(valid_M, torch.stack(stats_M), 0.0).sum(dim=1)
        sum_of = _Stats(*stat_sums.unbind())
        loss_sum = terms.kd_weight * sum_of.kd + terms.ce_weight * sum_of.label_ce
        sums = torch.cat((loss_sum.view(1), stat_sums, tokens.view(1)))  # in the order of DistillMetrics
        ctx.save_for_backward(gradients.hidden_MD, gradients.finished_head())
        ctx.mark_non_differentiable(sums)
        return loss_sum / divisor, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, to spare a second [V, D]. Autograd refuses saved tensors that were changed: no second backward.
        hidden, head = (None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors)
        return hidden, head, None, None, None, None


# Eager by design: the chunks reuse buffers in place, which a compiled graph has no words for.
_run = torch.compiler.disable(_DistillLoss.apply)  # type: ignore[no-untyped-call]


def _over_chunks(
    student: _Model, labels_M: Tensor, teacher: _Model | None, terms: _Terms, gradients: _Gradients
) -> _Stats:
    """Adds each chunk to `gradients` and returns the per-token statistics."""
    n_tokens, vocab = len(student.hidden_MD), len(student.head_VD)
    chunk = min(terms.chunk_tokens, n_tokens)
    logits_CV = student.head_VD.new_empty(chunk, vocab)
    teacher_logits_CV = None if teacher is None else teacher.head_VD.new_empty(chunk, vocab)
    tiles = _Tiles(terms, chunk, vocab, labels_M.device, want_gradient=gradients.wanted)
    stats = _Stats(*torch.zeros(len(_Stats._fields), n_tokens, dtype=torch.float32, device=labels_M.device))
    for start in range(0, n_tokens, max(chunk, 1)):
        rows = slice(start, min(start + chunk, n_tokens))
        count = rows.stop - rows.start
        s_CV, t_CV = torch.mm(student.hidden_MD[rows], student.head_VD.t(), out=logits_CV[:count]), None
        if teacher is not None and teacher_logits_CV is not None:
            t_CV = torch.mm(teacher.hidden_MD[rows], teacher.head_VD.t(), out=teacher_logits_CV[:count])
        tiles.run(s_CV, t_CV, labels_M[rows], stats.rows(rows))
        gradients.add(rows, d_logits_CV=s_CV)
    return stats


class _Gradients:
    """The gradients of the loss by the student's hidden states and head, collected chunk by chunk."""

    def __init__(self, student: _Model, wanted: tuple[bool, bool], token_weight_M: Tensor) -> None:
        """`token_weight_M` (fp32) is what a token's gradient counts: its part of the mean, 0 if it is ignored."""
        self.student = student
        self.wanted = any(wanted)
        self.weight_M1 = token_weight_M.unsqueeze(1)
        self.hidden_MD = torch.empty_like(student.hidden_MD) if wanted[0] else None
        self.head_VD = torch.zeros_like(student.head_VD, dtype=torch.float32) if wanted[1] else None

    def add(self, rows: slice, *, d_logits_CV: Tensor) -> None:
        """Takes the gradient by the logits of the tokens `rows`, not yet multiplied by the tokens' weights."""
        if self.hidden_MD is not None:
            torch.mm(d_logits_CV, self.student.head_VD, out=self.hidden_MD[rows]).mul_(self.weight_M1[rows])
        if self.head_VD is not None:
            # Weighting the narrow factor of the outer product is cheaper than weighting the logits.
            weighted_CD = (self.student.hidden_MD[rows] * self.weight_M1[rows]).to(d_logits_CV.dtype)
            if d_logits_CV.dtype == torch.float32:
                self.head_VD.addmm_(d_logits_CV.t(), weighted_CD)
            else:  # the product of a chunk is rounded once, the sum of the products is kept in fp32
                self.head_VD.add_(d_logits_CV.t() @ weighted_CD)

    def finished_head(self) -> Tensor | None:
        """The head's gradient in the head's dtype."""
        return None if self.head_VD is None else self.head_VD.to(self.student.head_VD.dtype)


class _Tiles:
    """The element-wise work on a chunk of logits, a few rows at a time, with scratch memory kept between chunks."""

    def __init__(self, terms: _Terms, chunk: int, vocab: int, device: torch.device, *, want_gradient: bool) -> None:
        elements = _CPU_TILE_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else _DEVICE_TILE_ELEMENTS
        self.n_rows = max(1, min(elements // vocab, chunk))
        self.terms = terms
        self.want_gradient = want_gradient
        # Two softmaxes, and fp32 copies of logits that come in another dtype.
        self.q_RV, self.p_RV, self.s_RV, self.t_RV = torch.empty(
            4, self.n_rows, vocab, dtype=torch.float32, device=device
        )

    def run(self, s_CV: Tensor, t_CV: Tensor | None, labels_C: Tensor, stats: _Stats) -> None:
        """Fills the chunk's statistics, and writes the gradient of the loss / terms.weight over the logits `s_CV`."""
        for start in range(0, len(s_CV), self.n_rows):
            rows = slice(start, start + self.n_rows)
            label_R1 = labels_C[rows].clamp(min=0).unsqueeze(1)  # an ignored label must be an index, its weight is 0
            self._tile(s_CV[rows], None if t_CV is None else t_CV[rows], label_R1, stats.rows(rows))

    def _tile(self, gradient_RV: Tensor, teacher_RV: Tensor | None, label_R1: Tensor, stats: _Stats) -> None:
        n = len(gradient_RV)
        s_RV, q_RV = _as_fp32(gradient_RV, self.s_RV[:n]), self.q_RV[:n]
        top_R, lse_R = _softmax(s_RV, out=q_RV)
        stats.label_ce.copy_(lse_R - s_RV.gather(1, label_R1).squeeze(1))
        if teacher_RV is None:
            if self.want_gradient:
                gradient_RV.copy_(_subtract_at(q_RV, label_R1, 1.0))
            return
        t_RV, p_RV = _as_fp32(teacher_RV, self.t_RV[:n]), self.p_RV[:n]
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

    def _tempered(self, gradient_RV: Tensor, s_RV: Tensor, t_RV: Tensor, label_R1: Tensor, stats: _Stats) -> None:
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


def _check(student: _Model, labels_M: Tensor, teacher: _Model | None, terms: _Terms) -> None:
    if min(terms.kd_weight, terms.ce_weight) < 0 or terms.weight <= 0:
        raise ValueError(f"weights must be >= 0, and one > 0: kd_weight={terms.kd_weight} ce_weight={terms.ce_weight}")
    if not terms.temperature > 0 or terms.chunk_tokens < 1:
        raise ValueError(f"temperature={terms.temperature} and chunk_tokens={terms.chunk_tokens} must be positive")
    for name, (hidden_MD, head_VD) in [("student", student)] + ([("teacher", teacher)] if teacher else []):
        if hidden_MD.dim() != 2 or head_VD.dim() != 2 or hidden_MD.shape[1] != head_VD.shape[1]:
            shapes = f"{tuple(hidden_MD.shape)} and {tuple(head_VD.shape)}"
            raise ValueError(f"the {name}'s hidden states and head must be [M, D] and [V, D], not {shapes}")
        if hidden_MD.dtype != head_VD.dtype:
            raise ValueError(f"the {name}'s hidden states are {hidden_MD.dtype} but its head is {head_VD.dtype}")
        if len(hidden_MD) != len(labels_M) or len(head_VD) != len(student.head_VD):
            raise ValueError(
                f"the {name} has {len(hidden_MD)} tokens and {len(head_VD)} words, "
                f"expected {len(labels_M)} (labels) and {len(student.head_VD)} (student)"
            )
