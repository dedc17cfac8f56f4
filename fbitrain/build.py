"""From a Config to the parts that the loop works with; what can be checked cheaply is checked before loading."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fbitrain import checkpoint_folders, resume
from fbitrain.base.errors import UserError
from fbitrain.calibration.text import calibration_ids, needs_text
from fbitrain.checkpoint import Saver
from fbitrain.checkpoint_check import with_shared_look
from fbitrain.checkpoint_files import TrainerState, data_states, trainer_state
from fbitrain.config import Config
from fbitrain.data.loader import TokenLoader
from fbitrain.data.reading.heldout_text import load_heldout
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.debug_logs import BatchLog, DocumentLog
from fbitrain.engine import Engine, compile_blocks, shard_teacher
from fbitrain.fine_tune import fine_tuned_student
from fbitrain.inference.evaluate import heldout_windows, predicted_bytes
from fbitrain.loading.language_model import positions_of, vocab_size_of
from fbitrain.loading.pretrained_shape import run_config
from fbitrain.metrics import IntervalMeans
from fbitrain.metrics_writer import MetricsWriter
from fbitrain.model.build import BinarizeReport, build_student
from fbitrain.model.config import has_signs_of_weights
from fbitrain.optim.schedules import batch_spans
from fbitrain.parameters import freeze_
from fbitrain.process import device, resolve_precision
from fbitrain.profiling import StepProfile
from fbitrain.ranks import agreed, hosts, say
from fbitrain.run_folder import prepare_run_dir, record_start, writable
from fbitrain.step_clock import StepClock
from fbitrain.step_targets import StepTargets, cache_problems, open_targets
from fbitrain.student import Student
from fbitrain.targets.cache_reader import TargetCache
from fbitrain.teacher import Teacher, load_teacher
from fbitrain.teacher_int8 import difference, host_in_int8
from fbitrain.tracking import ScaleTracker, SignTracker
from fbitrain.utilization import flops_per_token

INT8_WINDOWS = 8  # of held-out text, on which the error of an int8 teacher is measured


@dataclass(frozen=True)
class HeldoutWindows:
    """Windows of held-out text, int64 [n, seq_len], and the bytes of the tokens that are predicted in them."""

    windows: Tensor
    n_bytes: int


@dataclass
class Parts:
    """Everything the loop works with."""

    config: Config
    engine: Engine
    targets: StepTargets
    tokenizer: Tokenizer
    heldout: HeldoutWindows | None
    loader: TokenLoader
    writer: MetricsWriter
    clock: StepClock
    interval: IntervalMeans
    profile: StepProfile
    signs: SignTracker
    scales: ScaleTracker
    flops_per_token: float
    bits_per_weight: float  # of a release: what one binary weight takes, with its share of scales and salient weights
    batch_log: BatchLog | None
    document_log: DocumentLog | None
    blank_batch: Tensor  # int64 [micro_batch_size, seq_len + 1], what a rank whose stream failed goes on with
    saver: Saver
    rank: int
    hosts: list[str]  # of all ranks

    def close(self) -> None:
        """Ends the rank's other processes and writes out what the writer still holds, however the run ended."""
        self.profile.close()
        self.saver.close()
        self.loader.close()
        self.writer.close()


def build(config: Config, rank: int, world_size: int) -> tuple[Parts, TrainerState]:
    """Checks everything that can be checked cheaply, then loads teacher, student and stream, and resumes."""
    transformers.utils.logging.disable_progress_bar()  # every rank would draw its own, for a second's work
    agreed(lambda: prepare_run_dir(config) if rank == 0 else None)
    cache = agreed(lambda: open_targets(config))
    tokenizer = agreed(lambda: check_vocabularies(config, cache))
    heldout = agreed(lambda: load_windows(config, tokenizer))
    resume_from = choose_checkpoint(config)
    # Opened before anything heavy is loaded: a missing or changed shard is found here.
    loader = agreed(lambda: open_stream(config, tokenizer, rank, world_size, resume_from))
    look = resume_from is None and needs_text(config)
    token_ids = agreed(lambda: calibration_ids(config, tokenizer) if look else None)
    teacher = agreed(lambda: build_teacher(config))
    if teacher and config.distill.int8:
        say(f"the teacher in int8: {agreed(lambda: to_int8(teacher, heldout))}")
    if teacher and config.distill.compile:
        compile_blocks(teacher.body)
    lm, report = agreed(lambda: build_model(config, resume_from, token_ids))
    say(str(report))
    student = Student(lm, config.distill)
    if config.train.frozen:
        say(freeze_(student, config.train.frozen))
    engine = Engine(config, student)
    state = TrainerState()
    if resume_from:
        if remark := agreed(lambda: resume.restore(engine, resume_from, config.optim.on_change)):
            say(remark)
        state = trainer_state(resume_from)
        engine.shards.changed(state.step)
        say(f"resumed from {resume_from}")
    # Only now, with every check behind us: a launch that is refused leaves the folder of a good run as it was.
    agreed(lambda: record_start(config, world_size, state, tokenizer, resume_from) if rank == 0 else None)
    writer, batch_log, document_log = agreed(lambda: open_logs(config, rank, state.step))
    at = engine.device
    clock = StepClock(at, config.train.collective_timeout_s, config.engine.comm_timeout_s)
    engine.time_collectives(clock.waiting)
    interval = IntervalMeans(at, clock)
    weights = engine.matrix_weights()
    watched = report.binarized if has_signs_of_weights(config.binarize) else ()
    parts = Parts(
        config=config,
        engine=engine,
        targets=StepTargets(teacher, cache, config.distill.hidden_weight > 0),
        tokenizer=tokenizer,
        heldout=heldout,
        loader=loader,
        writer=writer,
        clock=clock,
        interval=interval,
        profile=StepProfile(config, rank, at, interval),
        signs=SignTracker(engine, watched, config.metrics.near_zero, at),
        scales=ScaleTracker(engine, at),
        flops_per_token=flops_per_token(config, weights, teacher.n_parameters if teacher else 0),
        bits_per_weight=report.bits_per_weight,
        blank_batch=torch.zeros(config.train.micro_batch_size, config.data.seq_len + 1, dtype=torch.int64),
        batch_log=batch_log,
        document_log=document_log,
        saver=Saver(engine, config),
        rank=rank,
        hosts=hosts(),
    )
    return parts, state


def open_logs(config: Config, rank: int, step: int) -> tuple[MetricsWriter, BatchLog | None, DocumentLog | None]:
    """What this rank writes into the run folder between checkpoints, from `step` on."""
    debug = config.debug
    with writable(config.run_dir):
        return (
            MetricsWriter(config, step),
            BatchLog(config.run_dir, rank) if debug.log_batches else None,
            DocumentLog(config.run_dir, rank) if debug.log_documents else None,
        )


def check_vocabularies(config: Config, cache: TargetCache | None) -> Tokenizer:
    """The tokenizer; student, teacher, cache and tokenizer must count the same tokens, and have a position for each."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    problems = list(_too_long(config))
    if cache:
        problems += cache_problems(cache, config, tokenizer)
    if config.distill.needs_teacher:
        teacher_vocab = vocab_size_of(config.distill.teacher)
        if teacher_vocab != config.model.vocab_size:
            problems.append(
                f"the teacher {config.distill.teacher} has vocab_size={teacher_vocab}, but "
                f"model.vocab_size={config.model.vocab_size}; distillation compares the two token by token, "
                f"set model.vocab_size={teacher_vocab}"
            )
    if tokenizer.vocab_size > config.model.vocab_size:
        problems.append(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, "
            f"more than model.vocab_size={config.model.vocab_size}"
        )
    if problems:
        raise UserError("config error: " + "; ".join(problems))
    return tokenizer


def _too_long(config: Config) -> Iterator[str]:
    """One sentence for each model that is loaded and has fewer positions than a sequence has tokens."""
    lengths = {"data.seq_len": config.data.seq_len}
    if config.distill.needs_teacher:
        yield from _beyond(lengths, f"the teacher {config.distill.teacher}", positions_of(config.distill.teacher))
    pretrained = config.model.pretrained
    if pretrained and run_config(Path(pretrained)) is None:
        lengths["calibration.seq_len"] = config.calibration.seq_len
        yield from _beyond(lengths, f"model.pretrained={pretrained}", positions_of(pretrained, "model.pretrained"))


def _beyond(lengths: Mapping[str, int], model: str, positions: int | None) -> Iterator[str]:
    for key, length in lengths.items():
        if positions is not None and length > positions:
            yield f"{key}={length} is more than the {positions} positions of {model}; set {key}={positions} or less"


def open_stream(
    config: Config, tokenizer: Tokenizer, rank: int, world_size: int, resume_from: Path | None
) -> TokenLoader:
    """The training stream from its beginning, or from where the checkpoint `resume_from` left it."""
    states, saved_shards = data_states(resume_from) if resume_from else (None, None)
    return TokenLoader(
        config.data,
        tokenizer,
        rank,
        world_size,
        config.train.micro_batch_size,
        states=states,
        saved_shards=saved_shards,
        sequences_per_step=[(first - 1, tokens // config.data.seq_len) for first, tokens in batch_spans(config.train)],
        log_documents=config.debug.log_documents,
        log_spans=bool(config.distill.cache),
    )


def load_windows(config: Config, tokenizer: Tokenizer) -> HeldoutWindows | None:
    if not config.eval.every or not config.data.heldout:
        return None
    text = load_heldout(config.data.heldout, tokenizer)
    cut = config.data.seq_len, config.eval.max_tokens
    return HeldoutWindows(heldout_windows(text.token_ids, *cut), predicted_bytes(text, *cut))


def choose_checkpoint(config: Config) -> Path | None:
    """Rank 0 chooses, and all ranks together read the checkpoints that it looks at."""
    folder = with_shared_look(lambda look: checkpoint_folders.choose(config, look))
    if folder:
        remark = agreed(lambda: resume.require_same_config(folder, config))
        if remark:
            say(remark)
    return folder


def build_teacher(config: Config) -> Teacher | None:
    distill, model = config.distill, config.model
    if not distill.needs_teacher:
        return None
    dtype = resolve_precision(config.engine.precision)
    teacher = load_teacher(
        distill.teacher,
        dtype=dtype,
        device=device(),
        trust_remote_code=distill.trust_remote_code,
        shard=shard_teacher(config) if distill.host == "zero3" else None,
    )
    shape = (teacher.config.num_hidden_layers, teacher.config.hidden_size)
    if distill.hidden_weight > 0 and shape != (model.n_layers, model.d_model):
        raise UserError(
            f"distill.hidden_weight compares hidden states layer by layer, but the teacher has {shape[0]} layers of "
            f"width {shape[1]} and the student {model.n_layers} of width {model.d_model}; set distill.hidden_weight=0"
        )
    return teacher


def to_int8(teacher: Teacher, heldout: HeldoutWindows | None) -> str:
    """Hosts the teacher in int8; says what that changes, measured on held-out text."""
    assert isinstance(teacher.body, nn.Module), "only a teacher that is not sharded is hosted in int8"
    if heldout is None:
        host_in_int8(teacher.body, teacher.head_weight.device)
        return "its error is not measured, for want of data.heldout"
    token_ids = heldout.windows[:INT8_WINDOWS].to(teacher.head_weight.device)
    exact = teacher.hidden(token_ids)
    host_in_int8(teacher.body, teacher.head_weight.device)
    return str(difference(teacher, exact, token_ids))


def build_model(
    config: Config, resume_from: Path | None, token_ids: Tensor | None
) -> tuple[PreTrainedModel, BinarizeReport]:
    """The student before ZeRO takes it apart; every rank makes the same one. token_ids: the text to calibrate on."""
    if config.debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
        torch.use_deterministic_algorithms(True)
    if config.model.pretrained:
        return fine_tuned_student(config, resume_from, token_ids, device())
    return build_student(config.model, config.binarize, config.train.seed)
