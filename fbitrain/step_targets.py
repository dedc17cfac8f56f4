"""What the student learns from in a step: the teacher's answers, those of a cache, or both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fbitrain.base.errors import UserError
from fbitrain.config import Config
from fbitrain.data.pretokenized.token_shards import TokenIndex
from fbitrain.data.reading.documents import Span
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.student import CachedTargets
from fbitrain.targets.cache_reader import TargetCache
from fbitrain.targets.sparse import SparseTargets
from fbitrain.targets.teacher_identity import require_same_teacher
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


def open_targets(config: Config) -> TargetCache | None:
    """distill.cache, with every shard of the corpus looked at. Raises UserError where targets are missing or of others.

    Which shards have none is said where the teacher takes their place.
    """
    distill = config.distill
    if not distill.cache:
        return None
    cache = TargetCache(distill.cache, distill.cache_rest)
    require_same_teacher(cache.settings, distill.teacher)
    missing = cache.cover(TokenIndex(config.data.pretokenized), [source.name for source in config.data.sources])
    if missing and distill.cache_gaps == "refuse":
        raise UserError(
            f"distill.cache={distill.cache} has no targets for {len(missing)} shards, {missing[0]} among them; write "
            "them with `fbitrain cache-teacher`, or set distill.cache_gaps=teacher, which asks the teacher for those"
        )
    return cache


def cache_problems(cache: TargetCache, config: Config, tokenizer: Tokenizer) -> Iterator[str]:
    """One sentence for each way in which the tokens of a cache are not those of the run."""
    settings, where = cache.settings, f"distill.cache={config.distill.cache}"
    if settings.tokenizer_fingerprint != tokenizer.fingerprint:
        yield (
            f"{where} is of the tokens of {settings.tokenizer}, which is another tokenizer than data.tokenizer="
            f"{config.data.tokenizer}; give that one, or write the cache anew"
        )
    if settings.vocab_size != config.model.vocab_size:
        yield f"{where} is of {settings.vocab_size} words and model.vocab_size={config.model.vocab_size}"
    for name in ("add_bos", "add_eos"):
        there, here = getattr(settings, name), getattr(config.data, name)
        if there != here:
            yield f"{where} was written with data.{name}={there}, and this run has {here}; give the same"
