"""Which values make no sense, alone or together: one sentence each. Wrong keys and types are config.py's. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fbitrain.config_optim import FREEZABLE, optim_problems
from fbitrain.data.config import data_problems
from fbitrain.loading.pretrained_shape import is_binary_run
from fbitrain.model.config import binarize_problems, model_problems
from fbitrain.model.method_table import METHODS
from fbitrain.model.phases import has_phases, phase_problems
from fbitrain.optim.schedules import lr_at

if TYPE_CHECKING:
    from fbitrain.config import Config

PRECISIONS = ("auto", "bf16", "fp32")
HIDDEN_PER = ("token", "sequence")
ON_SPIKE = ("stop", "skip", "rewind")


def semantic_problems(config: Config, world_size: int) -> Iterator[str]:
    """Yields one sentence per impossible value or contradiction between fields."""
    if not config.model.pretrained:
        yield from model_problems(config.model)
    if config.binarize.enabled:
        yield from binarize_problems(config.binarize, config.model)
    yield from phase_problems(config.binarize, config.train.total_steps)
    if has_phases(config.binarize) and is_binary_run(config.model.pretrained):
        yield (
            f"binarize.from_step and anneal_steps have nothing to do: model.pretrained={config.model.pretrained} is "
            "binary already; leave both out, or start from a model in full precision"
        )
    yield from data_problems(config.data)
    yield from _calibration_problems(config)
    yield from _train_problems(config, world_size)
    yield from _distill_problems(config)
    yield from optim_problems(config.optim, config.train.total_steps)
    yield from _two_stage_problems(config)
    yield from _engine_problems(config)


def _train_problems(config: Config, world_size: int) -> Iterator[str]:
    data = config.data
    for section, name, least in (
        ("train", "total_steps", 0 if config.model.pretrained else 1),
        ("train", "micro_batch_size", 1),
        ("train", "global_batch_tokens", 1),
        ("train", "spike_loss", 0),
        ("train", "spike_grad_norm", 0),
        ("train", "spike_window", 1),
        ("train", "collective_timeout_s", 1),
        ("checkpoint", "every", 1),
        ("checkpoint", "every_minutes", 0),
        ("checkpoint", "stop_within_s", 0),
        ("checkpoint", "margin_s", 0),
        ("checkpoint", "keep", 0),
        ("metrics", "every", 1),
        ("eval", "every", 0),
        ("eval", "sample_tokens", 0),
        ("distill", "chunk_tokens", 1),
    ):
        value = getattr(getattr(config, section), name)
        if not value >= least:
            yield f"{section}.{name}={value} must be at least {least}"
    for kind in config.train.frozen:
        if kind not in FREEZABLE:
            yield f"train.frozen has {kind!r}, which cannot be frozen; choose from {', '.join(FREEZABLE)}"
    if config.train.frozen and not config.model.pretrained:
        yield "train.frozen keeps what a trained model has; name one in model.pretrained, or leave train.frozen out"
    if config.train.on_spike not in ON_SPIKE:
        yield f"train.on_spike={config.train.on_spike!r} is unknown; choose one of {', '.join(ON_SPIKE)}"
    if "" in config.eval.prompts:
        yield "eval.prompts has an empty prompt; give it a word, or take it out"
    if config.eval.every and config.eval.max_tokens < data.seq_len:
        yield f"eval.max_tokens={config.eval.max_tokens} is less than one window of data.seq_len={data.seq_len} tokens"
    if config.eval.every and data.heldout and data.seq_len == 1:
        yield "data.seq_len=1 leaves no token of a held-out window to predict; set it to 2 or more, or eval.every=0"
    yield from _batch_problems(config)
    yield from _profile_problems(config)
    if world_size > data.n_lanes:
        yield f"data.n_lanes={data.n_lanes} is less than the {world_size} ranks of this run; every rank needs a lane"
    if 0 < config.model.max_seq_len < data.seq_len:
        yield f"data.seq_len={data.seq_len} is longer than model.max_seq_len={config.model.max_seq_len}"


def _batch_problems(config: Config) -> Iterator[str]:
    """Of the tokens per step and the steps at which they change."""
    train, seq_len = config.train, config.data.seq_len
    sizes = {"train.global_batch_tokens": train.global_batch_tokens}
    before = 1
    for i, change in enumerate(train.batch_changes):
        where = f"train.batch_changes[{i}]"
        sizes[f"{where}.global_batch_tokens"] = change.global_batch_tokens
        if change.global_batch_tokens < 1:
            yield f"{where}.global_batch_tokens={change.global_batch_tokens} must be at least 1"
        if change.from_step <= before:
            yield f"{where}.from_step={change.from_step} must be more than {before}, where the size before it begins"
        if change.from_step > train.total_steps:
            yield (
                f"{where}.from_step={change.from_step} comes after the last step, "
                f"train.total_steps={train.total_steps}; take the change out, or train for longer"
            )
        before = max(before, change.from_step)
    for name, tokens in sizes.items():
        if seq_len > 0 and tokens % seq_len:
            yield f"{name}={tokens} is not a multiple of data.seq_len={seq_len}; a step has whole sequences"


def _profile_problems(config: Config) -> Iterator[str]:
    steps, total = config.debug.profile_steps, config.train.total_steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1] <= total):
        yield (
            f"debug.profile_steps={steps} must be the first and the last step to profile, such as [10, 12], "
            f"from 1 to train.total_steps={total}"
        )


def _two_stage_problems(config: Config) -> Iterator[str]:
    """The second stage is to begin below the first one's end."""
    optim, total = config.optim, config.train.total_steps
    if optim.schedule != "two_stage" or not 1 < optim.stage2_step <= total:
        return
    reached = lr_at(config, optim.stage2_step - 1)
    if optim.stage2_lr > reached:
        yield (
            f"optim.stage2_lr={optim.stage2_lr} is above the {reached:.3g} that the first stage has reached at "
            f"optim.stage2_step={optim.stage2_step}; lower it, or let the second stage begin earlier"
        )


def _distill_problems(config: Config) -> Iterator[str]:
    distill = config.distill
    if distill.kd_weight < 0 or distill.ce_weight < 0 or distill.kd_weight + distill.ce_weight <= 0:
        yield "distill.kd_weight and distill.ce_weight must not be negative, and one of them must be positive"
    if distill.hidden_weight < 0:
        yield f"distill.hidden_weight={distill.hidden_weight} must not be negative"
    if distill.hidden_per not in HIDDEN_PER:
        yield f"distill.hidden_per={distill.hidden_per!r} is unknown; choose {' or '.join(HIDDEN_PER)}"
    if not distill.temperature > 0:
        yield f"distill.temperature={distill.temperature} must be positive"
    yield from _cache_problems(config)
    if distill.needs_teacher and not distill.teacher:
        yield "distill.teacher is empty; name the teacher, or set distill.kd_weight=0 to train on labels alone"
    for name in ("int8", "compile"):
        if getattr(distill, name) and distill.host == "zero3":
            yield f"distill.{name} needs distill.host=replicated; leave it out, or hold the teacher whole on every rank"
    if distill.host not in ("replicated", "zero3"):
        yield f"distill.host={distill.host!r} is unknown; choose replicated or zero3"
    if not (distill.teacher or config.model.pretrained) and config.data.tokenizer == "teacher":
        yield "data.tokenizer=teacher needs distill.teacher; name a tokenizer folder or file instead"


def _cache_problems(config: Config) -> Iterator[str]:
    distill = config.distill
    for name, choices in (("cache_gaps", ("refuse", "teacher")), ("cache_rest", ("renormalize", "label"))):
        if getattr(distill, name) not in choices:
            yield f"distill.{name}={getattr(distill, name)!r} is unknown; choose {' or '.join(choices)}"
    if not distill.cache:
        return
    if not config.data.pretokenized:
        yield "distill.cache belongs to pretokenized shards; set data.pretokenized to those that it was written for"
    if not distill.kd_weight:
        yield "distill.cache has nothing to do at distill.kd_weight=0; leave it out"
    if distill.hidden_weight > 0:
        yield "distill.cache holds no hidden states; set distill.hidden_weight=0, or leave the cache out"
    if distill.temperature != 1:
        yield f"distill.cache holds targets at temperature 1; set distill.temperature={distill.temperature} to 1"
    if distill.cache_gaps == "teacher" and distill.host == "zero3":
        yield "distill.cache_gaps=teacher asks the teacher on single ranks; set distill.host=replicated"


def _calibration_problems(config: Config) -> Iterator[str]:
    calibration = config.calibration
    for name, least in (("n_sequences", 1), ("seq_len", 0), ("block_size", 1)):
        if getattr(calibration, name) < least:
            yield f"calibration.{name}={getattr(calibration, name)} must be at least {least}"
    if not calibration.damping > 0:
        yield f"calibration.damping={calibration.damping} must be positive"
    if 0 < config.model.max_seq_len < calibration.seq_len:
        yield f"calibration.seq_len={calibration.seq_len} is longer than model.max_seq_len={config.model.max_seq_len}"
    salient = config.binarize.traits.salient if config.binarize.enabled else ""
    if calibration.ptq and salient != "frozen":
        solved = " or ".join(name for name, method in METHODS.items() if method.salient == "frozen")
        yield f"calibration.ptq is GPTQ-PB, which solves for binarize.method={solved} only; set calibration.ptq=false"
    if salient and is_binary_run(config.model.pretrained):
        yield from _idle_calibration(config)
    if salient and not config.model.pretrained:
        yield (
            f"binarize.method={config.binarize.method} keeps the salient weights of a trained model; "
            "name one in model.pretrained and start it with fbitrain finetune"
        )


def _idle_calibration(config: Config) -> Iterator[str]:
    """What would be passed over in silence where the salient weights were chosen by an earlier run."""
    for name in ("ptq", "path", "sources"):
        if getattr(config.calibration, name):
            yield (
                f"calibration.{name} has nothing to do: model.pretrained={config.model.pretrained} is binary already "
                "and keeps the salient weights that it has; leave it out, or start from a model in full precision"
            )


def _engine_problems(config: Config) -> Iterator[str]:
    engine = config.engine
    if engine.zero_stage not in (0, 1, 2, 3):
        yield f"engine.zero_stage={engine.zero_stage} is unknown; choose 0, 1, 2 or 3"
    if engine.precision not in PRECISIONS:
        yield f"engine.precision={engine.precision!r} is unknown; choose one of {', '.join(PRECISIONS)}"
    if engine.zero_stage == 0 and engine.precision != "fp32":
        yield f"engine.zero_stage=0 needs engine.precision=fp32, not {engine.precision}; in bf16 choose stage 1"
    if engine.zero_stage == 0 and engine.offload_optimizer:
        yield "engine.offload_optimizer needs engine.zero_stage 1, 2 or 3"
    if engine.comm_timeout_s < 1:
        yield f"engine.comm_timeout_s={engine.comm_timeout_s} must be at least 1"
    if engine.threads_per_rank < 0:
        yield f"engine.threads_per_rank={engine.threads_per_rank} must not be negative"
