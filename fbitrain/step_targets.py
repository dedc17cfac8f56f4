"""What the student learns from in a step: the teacher's answers, those of a cache, or both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fbitrain.data.reading.documents import Span
from fbitrain.student import CachedTargets
from fbitrain.targets.cache_reader import TargetCache
from fbitrain.targets.sparse import SparseTargets
from fbitrain.teacher import Teacher


@dataclass(frozen=True)
class StepTargets:
    """`read` may fail on one rank alone, `ask` is done by all: a sharded teacher needs every rank."""

    teacher: Teacher | None
    cache: TargetCache | None
    with_states: bool  # distill.hidden_weight compares every block

    def read(self, spans: Sequence[Sequence[Span]]) -> CachedTargets | None:
        """A batch's targets in the cache, if there is one. Raises UserError where its bytes are damaged."""
        if self.cache is None:
            return None
        live = [i for i, of_sequence in enumerate(spans) if not self.cache.covers(of_sequence)]
        return CachedTargets(self.cache.read([spans[i] for i in range(len(spans)) if i not in live]), live)

    def ask(self, batch: Tensor, cached: CachedTargets | None) -> dict[str, Any]:
        """The arguments of Student.forward beside `batch`, int64 [B, T + 1]; of a blank batch `cached` is None."""
        if self.cache is None:
            if self.teacher is None:
                return {}
            names = ("teacher_hidden", "teacher_head", "teacher_states")
            return dict(zip(names, self.teacher.targets(batch[:, :-1], with_states=self.with_states), strict=False))
        if cached is None:
            return {"cached": CachedTargets(SparseTargets.none(batch[:, 1:].numel()).to(batch.device), [])}
        found: dict[str, Any] = {"cached": CachedTargets(cached.targets.to(batch.device), cached.live)}
        if cached.live and self.teacher is not None:
            hidden, head = self.teacher.targets(batch[cached.live, :-1], with_states=False)
            found |= {"teacher_hidden": hidden, "teacher_head": head}
        return found
