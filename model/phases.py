"""Phases of precision in one run: which share of a layer is binary at which step. No torch.

A run may begin in full precision (arXiv 2502.11895) and change over to binary layers at once or in a mix of both.
"""

from __future__ import annotations

from collections.abc import Iterator

from fbitrain.model.config import BinarizeConfig


def has_phases(binarize: BinarizeConfig) -> bool:
    """Whether some steps of a run are not wholly binary though its layers are."""
    return binarize.enabled and (binarize.from_step > 0 or binarize.anneal_steps > 0)


def binary_share(binarize: BinarizeConfig, step: int) -> float:
    """The share λ of optimizer step `step` (1-based): a layer computes (1 - λ)·full precision + λ·binary.

    After step n a model is evaluated and released with the share of step n. Before the first step, n = 0, it is binary
    unless the run begins in full precision.
    """
    if not binarize.enabled:
        return 0.0
    if step == binarize.from_step == 0 or step > binarize.from_step + binarize.anneal_steps:
        return 1.0
    return max(0, step - binarize.from_step) / (binarize.anneal_steps + 1)


def first_binary_step(binarize: BinarizeConfig) -> int:
    """The first step whose share is 1."""
    return binarize.from_step + binarize.anneal_steps + 1


def unfinished_phase(binarize: BinarizeConfig, step: int) -> str:
    """What a model is after `step` steps, in words, as long as it is not what its run makes of it; else empty."""
    share = binary_share(binarize, step)
    if not binarize.enabled or share == 1:
        return ""
    kind = "in full precision" if share == 0 else f"mixed with a binary share of {share:.1%}"
    return f"{kind} after step {step}, binary from step {first_binary_step(binarize)} on"


def scales_begin(binarize: BinarizeConfig, done: int) -> bool:
    """Whether learned scales take their start values from the weights now, `done` steps having been trained.

    A run without a phase in full precision has them from the beginning.
    """
    return has_phases(binarize) and 0 < done == binarize.from_step


def phase_problems(binarize: BinarizeConfig, total_steps: int) -> Iterator[str]:
    """Yields one sentence per impossible phase in a run of `total_steps`."""
    for name in ("from_step", "anneal_steps"):
        if (value := getattr(binarize, name)) < 0:
            yield f"binarize.{name}={value} must not be negative"
    given = [f"binarize.{name}={n}" for name in ("from_step", "anneal_steps") if (n := getattr(binarize, name)) > 0]
    if not given:
        return
    phases = " and ".join(given)
    if not binarize.enabled:
        yield f"{phases} need binarize.enabled=true; without binary layers all steps are in full precision"
    elif binarize.traits.salient:
        yield (
            f"{phases} cannot be had with binarize.method={binarize.method}, whose salient weights are chosen before "
            "the first step; leave them out"
        )
    if max(0, binarize.from_step) + max(0, binarize.anneal_steps) > total_steps:
        yield (
            f"{phases} end after train.total_steps={total_steps}, a phase outside the run; lower them, or set "
            "binarize.enabled=false to train in full precision only"
        )
