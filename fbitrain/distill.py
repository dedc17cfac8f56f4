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

from fbitrain.loss_tiles import Stats, Terms, Tiles
from fbitrain.targets.sparse import SparseTargets

IGNORED_LABEL = -100  # tokens with this label count in no term and no metric


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
    targets: SparseTargets | None = None,
) -> tuple[Tensor, DistillMetrics]:
    """The training loss, a mean over valid tokens (fp32 scalar), and its parts.

    `hidden_MD` [M, D] and `head_VD` [V, D] are the student's, of one floating dtype; they get gradients.
    `teacher_hidden_MD` [M, Dt] and `teacher_head_VD` [V, Dt] may be None when `kd_weight` is 0, and are then not read.
    `targets` of M tokens, words and weights from a cache, take the teacher's place; temperature must then be 1, and of
    the metrics kd is an estimate and the teacher's other three are 0.
    `labels_M` are token ids (int64 [M]). Tokens labelled -100 count nowhere; with none left, loss and gradients are 0.

    Matrices are multiplied in their own dtype; softmax, losses and the head's gradient over chunks are fp32. Beyond the
    two gradients at most 2 · `chunk_tokens` · V logits exist. Nothing waits for the device. The gradients are computed
    here, and only if gradient mode is on; they can be taken once (a second backward raises RuntimeError).

    Raises ValueError on shapes, dtypes or weights that do not fit together.
    """
    student = _Model(hidden_MD, head_VD)
    teacher: _Model | SparseTargets | None = targets
    if kd_weight > 0 and targets is None:
        if teacher_hidden_MD is None or teacher_head_VD is None:
            raise ValueError(f"kd_weight={kd_weight} needs the teacher's hidden states and head")
        teacher = _Model(teacher_hidden_MD.detach(), teacher_head_VD.detach())
    terms = Terms(kd_weight, ce_weight, temperature, chunk_tokens)
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
        teacher: _Model | SparseTargets | None,
        terms: Terms,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        student = _Model(hidden_MD, head_VD)
        valid_M = labels_M != IGNORED_LABEL
        tokens = valid_M.sum(dtype=torch.float32)
        divisor = tokens.clamp(min=1)
        gradients = _Gradients(student, wanted, token_weight_M=valid_M * (terms.weight / divisor))
        stats_M = _over_chunks(student, labels_M, teacher, terms, gradients)

        stat_sums = torch.where(valid_M, torch.stack(stats_M), 0.0).sum(dim=1)
        sum_of = Stats(*stat_sums.unbind())
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
    student: _Model,
    labels_M: Tensor,
    teacher: _Model | SparseTargets | None,
    terms: Terms,
    gradients: _Gradients,
) -> Stats:
    """Adds each chunk to `gradients` and returns the per-token statistics."""
    n_tokens, vocab = len(student.hidden_MD), len(student.head_VD)
    chunk = min(terms.chunk_tokens, n_tokens)
    logits_CV = student.head_VD.new_empty(chunk, vocab)
    teacher_logits_CV = teacher.head_VD.new_empty(chunk, vocab) if isinstance(teacher, _Model) else None
    tiles = Tiles(terms, chunk, vocab, labels_M.device, want_gradient=gradients.wanted)
    stats = Stats(*torch.zeros(len(Stats._fields), n_tokens, dtype=torch.float32, device=labels_M.device))
    for start in range(0, n_tokens, max(chunk, 1)):
        rows = slice(start, min(start + chunk, n_tokens))
        count = rows.stop - rows.start
        s_CV = torch.mm(student.hidden_MD[rows], student.head_VD.t(), out=logits_CV[:count])
        t_CV: Tensor | SparseTargets | None = None
        if isinstance(teacher, SparseTargets):
            t_CV = teacher.rows(rows)
        elif teacher is not None and teacher_logits_CV is not None:
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


def _check(student: _Model, labels_M: Tensor, teacher: _Model | SparseTargets | None, terms: Terms) -> None:
    if min(terms.kd_weight, terms.ce_weight) < 0 or terms.weight <= 0:
        raise ValueError(f"weights must be >= 0, and one > 0: kd_weight={terms.kd_weight} ce_weight={terms.ce_weight}")
    if not terms.temperature > 0 or terms.chunk_tokens < 1:
        raise ValueError(f"temperature={terms.temperature} and chunk_tokens={terms.chunk_tokens} must be positive")
    if isinstance(teacher, SparseTargets) and (len(teacher) != len(labels_M) or terms.temperature != 1):
        raise ValueError(
            f"{len(teacher)} targets for {len(labels_M)} tokens at temperature {terms.temperature}: give one for each, "
            "and temperature 1, at which they were drawn"
        )
    for name, (hidden_MD, head_VD) in [("student", student)] + (
        [("teacher", teacher)] if isinstance(teacher, _Model) else []
    ):
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
