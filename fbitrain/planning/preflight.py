"""What a run needs, looked up and added up without loading a model, before a cluster's hours are spent on it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import torch

from fbitrain.base.errors import UserError
from fbitrain.build import check_vocabularies
from fbitrain.checkpoint_files import trained_parameters
from fbitrain.config import Config
from fbitrain.config_optim import describe_optimizer
from fbitrain.fine_tune import own_checkpoint, with_known_sizes
from fbitrain.model.size import ParameterCount, count_parameters, frozen_parameters
from fbitrain.optim.schedules import batch_spans
from fbitrain.planning.estimate import (
    CHECKPOINT_BYTES,
    RankMemory,
    TeacherSize,
    rank_memory,
    read_teacher_size,
    tokens_in_total,
)
from fbitrain.planning.preflight_data import look_at_data
from fbitrain.process import on_gpu, resolve_precision
from fbitrain.step_targets import open_targets

GB = 1e9
MEND_MEMORY = (
    "use more ranks, a higher engine.zero_stage, train.activation_checkpointing or a smaller train.micro_batch_size"
)
MEND_START = "every rank makes the whole model in fp32 before it is spread, so start fewer ranks on a node"


@dataclass
class Report:
    """Lines to print (label, text) and the reasons why the run cannot work here, one sentence each."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, label: str, text: str) -> None:
        self.lines.append((label, text))


def inspect_run(config: Config, *, world_size: int, ranks_here: int) -> Report:
    """What can be said of a run before it starts: `world_size` ranks, `ranks_here` of them on this node."""
    report = Report()
    try:
        config = with_known_sizes(config, world_size)
    except UserError as error:
        report.problems.append(str(error))
        return report
    n_muon = 0  # where the matrices of a pretrained model are not counted, an estimate that is too high
    if config.model.pretrained:
        n_parameters = _describe_pretrained(report, config)
    else:
        count = count_parameters(config.model, config.binarize)
        n_parameters = _describe_model(report, count)
        n_muon = count.binary + count.dense if config.optim.optimizer == "muon" else 0
    report.add("optimizer", f"{describe_optimizer(config.optim)}; {config.optim.schedule} schedule")
    _describe_tokens(report, config, world_size)
    _check_inputs(report, config, world_size, ranks_here)
    if not n_parameters or not config.model.n_heads:  # a model that says too little of itself to be added up
        return report
    n_frozen = min(_count_frozen(config), n_parameters)
    if n_frozen:
        report.add("", f"{n_frozen:,} of them frozen ({', '.join(config.train.frozen)}), counted as a Llama's")
    _check_disk(report, config, CHECKPOINT_BYTES * (n_parameters - n_frozen) + 4 * n_frozen - 4 * n_muon)
    precision = "bf16" if resolve_precision(config.engine.precision) is torch.bfloat16 else "fp32"
    teacher, remark = _teacher_size(config)
    counts: dict[str, int] = {"n_parameters": n_parameters, "n_muon": n_muon, "n_frozen": n_frozen}
    memory = rank_memory(config, **counts, world_size=world_size, precision=precision, teacher=teacher)
    _describe_memory(report, config, memory, f"over {world_size} ranks, {precision}", remark)
    _check_memory(report, memory, ranks_here)
    return report


def _describe_pretrained(report: Report, config: Config) -> int:
    """The parameters of the model that fine-tuning starts from; 0 where they cannot be counted without loading it."""
    report.add("model", f"{config.model.pretrained}, binarize.method={config.binarize.method}")
    try:
        n_parameters = _count_pretrained(config.model.pretrained)
    except UserError as error:
        report.problems.append(str(error))
        return 0
    except (OSError, ValueError, KeyError):
        report.add("", "memory and disk not counted: it is not a local folder with safetensors files")
        return 0
    report.add("", f"{n_parameters:,} parameters")
    return n_parameters


def _count_pretrained(pretrained: str) -> int:
    """The trained parameters of a checkpoint of ours, or all parameters of a model's folder.

    Raises UserError for a run that has no checkpoint.
    """
    checkpoint = own_checkpoint(pretrained)
    return trained_parameters(checkpoint) if checkpoint else read_teacher_size(Path(pretrained)).n_parameters


def _count_frozen(config: Config) -> int:
    """The parameters of train.frozen, as many as a Llama of the model's sizes has."""
    about = Path(config.model.pretrained).expanduser() / "config.json"
    tied = about.is_file() and bool(json.loads(about.read_text(encoding="utf-8")).get("tie_word_embeddings"))
    return frozen_parameters(replace(config.model, tie_embeddings=tied), config.train.frozen)


def _describe_model(report: Report, count: ParameterCount) -> int:
    report.add("model", f"{count.total:,} parameters: {count.binary:,} binary, {count.scales:,} scales,")
    report.add("", f"{count.embeddings:,} embeddings and head, {count.dense:,} other dense, {count.norms:,} norms")
    report.add("", f"{count.bits_per_weight:.3f} bits per binary weight, scales included")
    return count.total


def _describe_tokens(report: Report, config: Config, world_size: int) -> None:
    train = config.train
    for first, tokens in batch_spans(train):
        portion = world_size * train.micro_batch_size * config.data.seq_len
        n = config.grad_accum_steps(world_size, first)
        uneven = "" if n * portion == tokens else f", of which {tokens / (n * portion):.0%} are filled"
        report.add(
            "tokens" if first == 1 else "",
            f"{tokens:,} per step {'' if first == 1 else f'from step {first:,} on '}= {world_size} ranks "
            f"× {train.micro_batch_size} sequences × {config.data.seq_len} tokens × {n} grad_accum_steps{uneven}",
        )
    report.add("", f"{tokens_in_total(config):,} in {train.total_steps:,} steps")


def _check_inputs(report: Report, config: Config, world_size: int, ranks_here: int) -> None:
    """Teacher, tokenizer and shards: there, and made for each other."""
    try:
        cache = open_targets(config)
        if cache:
            report.add("targets", cache.settings.describe())
        tokenizer = check_vocabularies(config, cache)
    except UserError as error:
        report.problems.append(str(error))
        tokenizer = None
    lines, problems = look_at_data(config, tokenizer, world_size=world_size, ranks_here=ranks_here)
    for line in lines:
        report.add("data", line)
    report.problems += [problem for problem in problems if problem not in report.problems]


def _check_disk(report: Report, config: Config, checkpoint_bytes: int) -> None:
    folder = config.run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    checkpoints = config.checkpoint.keep + 1 if config.checkpoint.keep else 2  # one more while the next is written
    needed = checkpoints * checkpoint_bytes
    report.add("disk", f"{needed / GB:.1f} GB for {checkpoints} checkpoints; {free / GB:.1f} GB free in {folder}")
    if free < needed:
        report.problems.append(
            f"checkpoints need {needed / GB:.1f} GB and {folder} has {free / GB:.1f} GB free; make room, set run.dir "
            "or lower checkpoint.keep"
        )


def _teacher_size(config: Config) -> tuple[TeacherSize | None, str]:
    """The teacher's size where that is known without loading it, or None and why not."""
    if not config.distill.needs_teacher:
        return None, f"none: its targets are in {config.distill.cache}" if config.distill.cache else "none"
    folder = Path(config.distill.teacher)
    try:
        return read_teacher_size(folder), config.distill.host
    except (OSError, ValueError, KeyError):
        return None, f"not counted: {folder} is not a local folder with safetensors files"


def _describe_memory(report: Report, config: Config, memory: RankMemory, spread: str, teacher: str) -> None:
    checkpointing = "with" if config.train.activation_checkpointing else "without"
    place = "in host memory" if memory.optimizer_on_host else "on the device"
    report.add("per rank", f"ZeRO stage {config.engine.zero_stage} {spread} (estimate)")
    for label, size, remark in (
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, ""),
        ("optimizer", memory.optimizer, f"fp32 weights, optimizer state; {place}"),
        ("buckets", memory.buckets, ""),
        ("activations", memory.activations, f"{checkpointing} checkpointing"),
        ("loss", memory.loss, f"in chunks of {config.distill.chunk_tokens} tokens"),
        ("teacher", memory.teacher, teacher),
        ("libraries", memory.runtime, ""),
        ("total", memory.total, ""),
        ("start", memory.start, "in host memory, before the first step"),
        ("save", memory.save, f"in host memory, {'from the first' if memory.save_is_kept else 'during a'} checkpoint"),
    ):
        report.add("", f"{label:<12}{size / GB:>8.2f} GB  {remark}".rstrip())


def _check_memory(report: Report, memory: RankMemory, ranks_here: int) -> None:
    if on_gpu():
        free = min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
        if memory.on_device > free:
            report.problems.append(
                f"a rank needs {memory.on_device / GB:.1f} GB of GPU memory and {free / GB:.1f} GB are free; "
                + MEND_MEMORY
            )
    on_host = memory.on_host(on_gpu=on_gpu())
    free_host = psutil.virtual_memory().available
    if ranks_here * on_host > free_host:
        starting = on_host == memory.runtime + memory.start
        report.problems.append(
            f"{ranks_here} ranks on this node need {ranks_here * on_host / GB:.1f} GB of memory and "
            f"{free_host / GB:.1f} GB are free; " + (MEND_START if starting else MEND_MEMORY)
        )
