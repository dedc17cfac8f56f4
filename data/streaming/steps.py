"""Sequences per step: turns a number of steps into a global sequence number, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Sequences per step over all ranks, 0 where that is not known; or, for a batch that grows, pairs of the steps that are
# done when a size begins, ascending from 0, and the sequences per step from there on.
SequencesPerStep = int | Sequence[Sequence[int]]


def total_after(spans: Sequence[tuple[int, int]], steps: int) -> int:
    """What the first `steps` steps have together; `spans`: (steps done when a size begins, what a step has then)."""
    ends = [*(start for start, _ in spans[1:]), steps]
    return sum(size * max(0, min(end, steps) - start) for (start, size), end in zip(spans, ends, strict=True))


def dealt(first: int, n_sequences: int, n_lanes: int, world_size: int) -> list[int]:
    """Rank by rank, how many of the run's next sequences it draws.

    They come from lane `first`, the one after it and so on, around; lane l belongs to rank l % world_size.
    """
    rounds, rest = divmod(n_sequences, n_lanes)
    shares = [0] * world_size
    for lane in range(n_lanes):
        shares[lane % world_size] += rounds + ((lane - first) % n_lanes < rest)
    return shares


@dataclass(frozen=True)
class StepSizes:
    """The sizes in order: (steps done when the size begins, sequences per step). Empty where they are not known."""

    spans: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, sizes: SequencesPerStep) -> StepSizes:
        """From numbers, which may have been through JSON."""
        if isinstance(sizes, int):
            return cls(((0, sizes),) if sizes else ())
        return cls(tuple((start, size) for start, size in sizes))

    def to_json(self) -> int | list[list[int]]:
        """What `of` takes; one number if the size never changes."""
        if len(self.spans) <= 1:
            return self.spans[0][1] if self.spans else 0
        return [list(span) for span in self.spans]

    def sequences_after(self, steps: int) -> int:
        """Sequences that all ranks together have drawn after `steps` steps."""
        return total_after(self.spans, steps)

    def steps_within(self, sequences: int) -> int:
        """Steps that are complete when all ranks together have drawn `sequences`."""
        begun = [(start, size) for start, size in self.spans if self.sequences_after(start) <= sequences]
        start, size = begun[-1]
        return start + (sequences - self.sequences_after(start)) // size
