"""How weights are updated: learning rates and weight decay by kind of parameter, Muon, schedules. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "two_stage")
UPDATE_SIZES = ("spectral", "rms")
ON_CHANGE = ("refuse", "restart")


@dataclass(frozen=True)
class KindFactors:
    """A factor for each kind of parameter; the kinds are fbitrain/parameters.py's."""

    matrices: float = 1.0  # binary latents and the blocks' other Linears; read for optimizer=adamw
    scales: float = 1.0  # α, β and the vectors of OneBit and BinaryMoS
    routers: float = 1.0  # BinaryMoS's
    embeddings: float = 1.0  # a head that is tied to them, too
    head: float = 1.0
    norms: float = 1.0
    biases: float = 1.0
    others: float = 1.0  # whatever else a model has, such as a state-space model's tensors


UNDECAYED = ("scales", "routers", "embeddings", "norms", "biases")
KINDS = tuple(f.name for f in fields(KindFactors))
FREEZABLE = ("embeddings", "head", "norms", "biases", "others")  # kinds that are no part of a binary layer's weight


@dataclass(frozen=True)
class FusedMatrix:
    """A Linear that holds several matrices one above the other, as Phi-3's qkv_proj does: Muon orthogonalizes each."""

    name: str = ""  # the Linear's qualified name, or the last part of it
    rows: list[int] = field(default_factory=list)  # output features of each matrix; their sum is the Linear's


@dataclass(frozen=True)
class MuonConfig:
    """Muon (Jordan et al. 2024) for parameters of the kind `matrices`; read for optim.optimizer=muon.

    The momentum of the gradient, [N out_features, K in_features], is replaced by an orthogonal matrix close to it, O,
    whose singular values are about 1. A step then adds -lr · size · O to the matrix.
    """

    # Learning rate at the schedule's peak, in units that update_size fixes; it follows optim.lr's schedule.
    lr: float = 0.02
    momentum: float = 0.95  # of the gradient's running mean; Nesterov's form
    ns_steps: int = 5  # Newton-Schulz iterations
    weight_decay: float = 0.0  # a step multiplies the matrix by 1 - lr · weight_decay
    # spectral: size = √max(1, N/K), so that lr is the spectral norm of a step (times that root) whatever the width.
    # rms: size = 0.2·√max(N, K), so that a step changes a weight by about 0.2·lr, as AdamW's do (arXiv 2502.16982).
    update_size: str = "spectral"
    fused: list[FusedMatrix] = field(default_factory=list)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, and Muon for the matrices if asked for; a schedule of warm-up and decay (defaults: arXiv 2407.07093)."""

    optimizer: str = "adamw"  # of the matrices: adamw or muon; all other kinds have AdamW
    lr: float = 3e-4  # the peak
    # cosine: warm-up, then a half cosine from lr to min_lr at train.total_steps.
    # linear: warm-up, then a straight line from lr to min_lr (0: linear to zero).
    # wsd: warm-up, lr, and in the last cooldown_steps a straight line to min_lr (warm-up, stable, decay).
    # two_stage: BitNet b1.58 2B4T's (arXiv 2504.12285): a cosine that falls to stage2_lr and goes on from there at
    #   stage2_step, and a weight decay that rises to its full value until then and is 0 afterwards.
    schedule: str = "cosine"
    min_lr: float = 3e-5  # reached at train.total_steps
    warmup_steps: int = 2000  # optimizer steps
    cooldown_steps: int = 0  # read for schedule=wsd
    stage2_step: int = 0  # the first step of the second stage; read for schedule=two_stage
    stage2_lr: float = 0.0  # the second stage's peak; read for schedule=two_stage
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1
    lr_factor: KindFactors = field(default_factory=KindFactors)  # of lr; with optimizer=muon matrices have muon.lr
    # Of weight_decay; with optimizer=muon matrices have muon.weight_decay.
    decay_factor: KindFactors = field(default_factory=lambda: KindFactors(**dict.fromkeys(UNDECAYED, 0.0)))
    max_grad_norm: float = 1.0  # of all gradients together, before any optimizer sees them; 0: no clipping
    muon: MuonConfig = field(default_factory=MuonConfig)
    # A checkpoint that holds no state of this optimizer for some parameters: refuse it, or restart: begin with none.
    on_change: str = "refuse"


def describe_optimizer(optim: OptimConfig) -> str:
    """Which optimizer has which kinds of parameters, with what differs from optim.lr; one line."""
    parts = [f"Muon {optim.muon.lr:g} for the matrices, AdamW for the rest" if optim.optimizer == "muon" else "AdamW"]
    factors = {kind: getattr(optim.lr_factor, kind) for kind in KINDS}
    parts += [f"{kind} at {factor:g} of its rate" for kind, factor in factors.items() if factor != 1]
    return ", ".join([*parts, f"weight decay {optim.weight_decay:g}"])


def with_old_keys(optim: Any) -> Any:
    """The section as it is written today: `no_decay`, a list of kinds, became `decay_factor`.

    What `no_decay` cannot have been is left as it is, to be refused.
    """
    exempt = optim.get("no_decay") if isinstance(optim, dict) else None
    if not isinstance(exempt, list) or not set(map(str, exempt)) <= {"scales", "norms", "embeddings", "biases"}:
        return optim
    rest = {key: value for key, value in optim.items() if key != "no_decay"}
    exempt = [*exempt, *(["routers"] if "scales" in exempt else [])]  # a kind of its own since
    factors = {kind: 0.0 if kind in exempt else 1.0 for kind in KINDS}
    newer = rest.get("decay_factor")
    return {**rest, "decay_factor": {**factors, **newer} if isinstance(newer, dict) else newer or factors}


def optim_problems(optim: OptimConfig, total_steps: int) -> Iterator[str]:
    """Yields one sentence per impossible value; `total_steps` is the run's, 0 for one that trains nothing."""
    for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("on_change", ON_CHANGE)):
        value = getattr(optim, name)
        if value not in choices:
            yield f"optim.{name}={value!r} is unknown; choose one of {', '.join(choices)}"
    if not optim.lr > 0:
        yield f"optim.lr={optim.lr} must be positive"
    if not 0 <= optim.min_lr <= optim.lr:
        yield f"optim.min_lr={optim.min_lr} must lie between 0 and optim.lr={optim.lr}"
    if not optim.eps > 0:
        yield f"optim.eps={optim.eps} must be positive"
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        yield f"optim.betas={optim.betas} must be two numbers in [0, 1)"
    for name in ("weight_decay", "max_grad_norm"):
        if getattr(optim, name) < 0:
            yield f"optim.{name}={getattr(optim, name)} must not be negative"
    for section in ("lr_factor", "decay_factor"):
        for kind in KINDS:
            if (value := getattr(getattr(optim, section), kind)) < 0:
                yield f"optim.{section}.{kind}={value} must not be negative"
    yield from _schedule_problems(optim, total_steps)
    yield from _muon_problems(optim)


def _schedule_problems(optim: OptimConfig, total: int) -> Iterator[str]:
    # A run of no steps has no use for a schedule.
    if optim.warmup_steps < 0 or 0 < total < optim.warmup_steps:
        yield f"optim.warmup_steps={optim.warmup_steps} must lie in 0 to train.total_steps={total}"
    if optim.schedule == "wsd":
        if optim.cooldown_steps < 0 or 0 < total < optim.cooldown_steps + max(0, optim.warmup_steps):
            yield (
                f"optim.cooldown_steps={optim.cooldown_steps} must lie in 0 to train.total_steps={total} less "
                f"optim.warmup_steps={optim.warmup_steps}"
            )
    elif optim.cooldown_steps:
        yield f"optim.cooldown_steps={optim.cooldown_steps} is for optim.schedule=wsd, not {optim.schedule}"
    if optim.schedule == "two_stage":
        if total > 0 and not max(0, optim.warmup_steps) < optim.stage2_step <= total:
            yield (
                f"optim.stage2_step={optim.stage2_step} must lie between optim.warmup_steps={optim.warmup_steps} and "
                f"train.total_steps={total}"
            )
        if not optim.min_lr <= optim.stage2_lr <= optim.lr:
            yield (
                f"optim.stage2_lr={optim.stage2_lr} must lie between optim.min_lr={optim.min_lr} and "
                f"optim.lr={optim.lr}"
            )
    else:
        for name in ("stage2_step", "stage2_lr"):
            if getattr(optim, name):
                yield f"optim.{name}={getattr(optim, name)} is for optim.schedule=two_stage, not {optim.schedule}"


def _muon_problems(optim: OptimConfig) -> Iterator[str]:
    muon = optim.muon
    if not muon.lr > 0:
        yield f"optim.muon.lr={muon.lr} must be positive"
    if not 0 <= muon.momentum < 1:
        yield f"optim.muon.momentum={muon.momentum} must lie in [0, 1)"
    if muon.ns_steps < 1:
        yield f"optim.muon.ns_steps={muon.ns_steps} must be at least 1"
    if muon.weight_decay < 0 or muon.lr * muon.weight_decay >= 1:
        yield f"optim.muon.weight_decay={muon.weight_decay} must lie from 0 to less than 1/optim.muon.lr"
    if muon.update_size not in UPDATE_SIZES:
        yield f"optim.muon.update_size={muon.update_size!r} is unknown; choose one of {', '.join(UPDATE_SIZES)}"
    for i, fused in enumerate(muon.fused):
        if not fused.name or len(fused.rows) < 2 or min(fused.rows) < 1:
            yield f"optim.muon.fused[{i}] needs a name and the rows of at least two matrices, such as [768, 768, 768]"
    if optim.optimizer == "muon":
        for section, instead in (("lr_factor", "lr"), ("decay_factor", "weight_decay")):
            if (value := getattr(optim, section).matrices) != 1:
                yield (
                    f"optim.{section}.matrices={value} is not read with optim.optimizer=muon; "
                    f"set optim.muon.{instead} instead"
                )
