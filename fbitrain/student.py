"""The module that DeepSpeed wraps: a binary language model whose head computes the loss instead of logits.

B sequences, T seq_len, D width of the student, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.config import DistillConfig
from fbitrain.distill import DistillMetrics, distill_loss
from fbitrain.model.latent import LatentLinear
from fbitrain.ranks import on_all_ranks
from fbitrain.targets.sparse import SparseTargets


class LossHead(nn.Module):
    """lm_head that can hand its own weight to a loss.

    ZeRO-3 gathers a module's parameters only while that module's forward runs, so the loss, which needs the weight and
    never the logits, has to run in here.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight  # [V,D]; the same Parameter, so tied embeddings stay tied

    def forward(
        self, hidden: Tensor, loss: Callable[[Tensor, Tensor], tuple[Tensor, DistillMetrics]] | None = None
    ) -> Tensor | tuple[Tensor, DistillMetrics]:
        """hidden [...,D] -> logits [...,V], or what `loss(hidden, weight)` returns."""
        return F.linear(hidden, self.weight) if loss is None else loss(hidden, self.weight)


def hidden_distance(states: Sequence[Tensor], teacher_states: Sequence[Tensor]) -> Tensor:
    """Σ over blocks of the mean squared difference (fp32 scalar), a mean over sequences, tokens and width.

    BinaryMoS's layer-to-layer loss (arXiv 2406.12311). As a mean it depends neither on batch size nor on length.
    """
    pairs = zip(states, teacher_states, strict=True)
    return torch.stack([F.mse_loss(mine.float(), theirs.float()) for mine, theirs in pairs]).sum()


@dataclass(frozen=True, eq=False)
class CachedTargets:
    """Targets of a batch's sequences; those in `live` the cache does not cover, and the teacher itself serves them."""

    targets: SparseTargets  # of the tokens of the other sequences, one sequence after another
    live: list[int]


class Student(nn.Module):
    """A causal language model together with its training objective; `lm` is the model that is released.

    Its logits must be the product of its last hidden state and its head (`language_model.checked_head`).
    Raises UserError if the head has become binary: the loss multiplies with its matrix as it is.
    """

    def __init__(self, lm: PreTrainedModel, distill: DistillConfig) -> None:
        super().__init__()
        if isinstance(head := lm.get_output_embeddings(), LatentLinear):
            name = next(name for name, module in lm.named_modules() if module is head)
            reason = f"{name} is the output head, whose matrix the loss reads in full precision"
            raise on_all_ranks(UserError(f"{reason}; add {name.rpartition('.')[2]!r} to binarize.skip"))
        self.lm = lm
        self.lm.set_output_embeddings(LossHead(lm.get_output_embeddings()))
        self.distill = distill

    @property
    def head(self) -> LossHead:
        return cast(LossHead, self.lm.get_output_embeddings())

    def forward(
        self,
        token_ids: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: Tensor | None = None,
        teacher_states: Sequence[Tensor] | None = None,
        *,
        cached: CachedTargets | None = None,
        last_logits: bool = False,
    ) -> tuple[Tensor, DistillMetrics] | Tensor:
        """Loss and metrics over packed sequences, or the next-token logits.

        token_ids: int64 [B,T+1]; position t predicts position t+1. With `last_logits` every token is input and the
        result is logits [B,V] after the last one.
        teacher_hidden [B,T,Dt] and teacher_head [V,Dt]: the teacher's final hidden states and output matrix. Without
        them the loss is the plain cross-entropy on labels, whatever the weights in the config (used for evaluation).
        teacher_states: what each of the teacher's blocks returned [B,T,Dt], where distill.hidden_weight is not 0.
        cached: targets from a cache; teacher_hidden is then that of the sequences cached.live alone, or None.
        """
        inputs = token_ids if last_logits else token_ids[:, :-1]
        compare = teacher_states is not None
        output = self.lm.base_model(input_ids=inputs, use_cache=False, output_hidden_states=compare)
        hidden = output.last_hidden_state
        if last_logits:
            logits: Tensor = self.head(hidden[:, -1])
            return logits

        def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, DistillMetrics]:
            of_teacher = (teacher_hidden, teacher_head)
            if cached is None:
                return self._loss(hidden, weight, token_ids, of_teacher)
            if not cached.live:
                return self._loss(hidden, weight, token_ids, cached.targets)
            parts = [self._loss(hidden[cached.live], weight, token_ids[cached.live], of_teacher)]
            if rest := [i for i in range(len(token_ids)) if i not in cached.live]:
                parts.append(self._loss(hidden[rest], weight, token_ids[rest], cached.targets))
            return _mean(parts)

        total, metrics = self.head(hidden, loss)
        if teacher_states is None:
            return total, metrics
        distance = hidden_distance(output.hidden_states[1:], teacher_states)
        metrics = replace(metrics, hidden_mse=distance.detach() * metrics.tokens)
        return total + self.distill.hidden_factor(inputs.shape[1]) * distance, metrics

    def _loss(
        self,
        hidden_BTD: Tensor,
        head_VD: Tensor,
        token_ids: Tensor,
        teacher: tuple[Tensor | None, Tensor | None] | SparseTargets,
    ) -> tuple[Tensor, DistillMetrics]:
        """The loss of some sequences. Without a teacher's hidden states it is the cross-entropy on labels."""
        targets = teacher if isinstance(teacher, SparseTargets) else None
        teacher_hidden, teacher_head = (None, None) if isinstance(teacher, SparseTargets) else teacher
        distilling = targets is not None or teacher_hidden is not None
        return distill_loss(
            hidden_BTD.flatten(0, 1),
            head_VD,
            token_ids[:, 1:].reshape(-1),
            teacher_hidden.flatten(0, 1) if teacher_hidden is not None else None,
            teacher_head,
            kd_weight=self.distill.kd_weight if distilling else 0.0,
            ce_weight=self.distill.ce_weight if distilling or self.distill.kd_weight == 0 else 1.0,
            temperature=self.distill.temperature,
            chunk_tokens=self.distill.chunk_tokens,
            targets=targets,
        )

    @torch.no_grad()
    def greedy(self, token_ids: Tensor, n_new: int, forward: Callable[..., Tensor]) -> Tensor:
        """Extends token_ids [1,T] by n_new most likely tokens.

        `forward` is the engine's call. Every rank must take part with the same input, because under ZeRO-3 each
        forward gathers weights from all of them; there is no cache, since
        this serves a few short samples per evaluation.
        """
        for _ in range(n_new):
            window = token_ids[:, -getattr(self.lm.config, "max_position_embeddings", token_ids.shape[1]) :]
            token_ids = torch.cat([token_ids, forward(window, last_logits=True).argmax(-1, keepdim=True)], dim=1)
        return token_ids


def _mean(parts: Sequence[tuple[Tensor, DistillMetrics]]) -> tuple[Tensor, DistillMetrics]:
    """The mean over the tokens of all parts, each of which has its own tokens' mean; metrics are sums."""
    sums = {field.name: sum(getattr(metrics, field.name) for _, metrics in parts) for field in fields(DistillMetrics)}
    tokens = cast(Tensor, sums["tokens"]).clamp(min=1)
    loss = torch.stack([mean * metrics.tokens for mean, metrics in parts]).sum() / tokens
    return loss, DistillMetrics(**sums)
