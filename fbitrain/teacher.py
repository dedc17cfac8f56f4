"""The teacher: a frozen full-precision language model, from a Hugging Face folder or hub id, or from a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fbitrain.loading.language_model import checked_head, load_language_model


@dataclass(frozen=True, eq=False)
class Teacher:
    """A frozen model in eval mode. Not a Module, so no student, optimizer or checkpoint can ever take it for a part."""

    config: Any  # the model's transformers config
    head_weight: Tensor  # [V, Dt], whole on every rank; shares memory with the embedding where the head is tied
    n_parameters: int  # a tied head counts once
    body: Callable[..., Any]  # token ids to last hidden state; a wrapper where the teacher is sharded

    @property
    def vocab_size(self) -> int:
        return len(self.head_weight)

    @torch.no_grad()
    def hidden(self, input_ids: Tensor) -> Tensor:
        """The last hidden state after the final norm, [B, T, Dt], for token ids int64 [B, T]."""
        hidden_BTD: Tensor = self.body(input_ids=input_ids, use_cache=False).last_hidden_state
        return hidden_BTD

    @torch.no_grad()
    def targets(self, input_ids: Tensor, *, with_states: bool) -> tuple[Any, ...]:
        """What Student.forward is told: the last hidden state, the head and, if asked, what every block returned.

        The states are [B, T, Dt] each, the last one after the final norm.
        """
        output = self.body(input_ids=input_ids, use_cache=False, output_hidden_states=with_states)
        states = (output.hidden_states[1:],) if with_states else ()  # the first is the embedding
        return output.last_hidden_state, self.head_weight, *states

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """[B, T, V], for evaluation of a few sequences; training never forms them (fbitrain.distill)."""
        return self.hidden(input_ids) @ self.head_weight.t()


def load_teacher(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    shard: Callable[[nn.Module], Callable[..., Any]] | None = None,
) -> Teacher:
    """Loads the teacher at `path` and freezes it.

    Without `shard` every rank holds the whole model on `device`; on a CPU, weights stored in `dtype` stay mapped from
    the file, and the ranks of a machine share them. With `shard` (distill.host=zero3) the model's body, still on the
    CPU, is passed through it, and it returns what is called instead. The head is needed whole at every step, so
    it is not sharded: it stays on `device`, copied if it is tied to the embedding.

    Raises UserError if there is no such model, if it lacks weights, or if its logits are anything but hidden · headᵀ.
    Raises RuntimeError while an HfDeepSpeedConfig for ZeRO-3 is alive, which makes transformers take the weights apart:
    load the teacher before it is made.
    """
    model = load_language_model(path, dtype, trust_remote_code=trust_remote_code).requires_grad_(False).eval()
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise RuntimeError("the teacher was loaded inside a ZeRO-3 context, which partitioned it; load it before")
    if shard is None:
        model = model.to(device)
    head_VD = checked_head(model, path)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    body: Callable[..., Any] = model.base_model
    if shard is not None:
        head_VD = head_VD.to(device, copy=True)
        body = shard(model.base_model)
    return Teacher(model.config, head_VD, n_parameters, body)
