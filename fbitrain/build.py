"""From a Config to the parts that the loop works with; what can be checked cheaply is checked before loading."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from fbitrain import checkpoint_folders, environment, resume
from fbitrain.base.errors import UserError
from fbitrain.base.files import lock_folder, write_json, write_text
from fbitrain.calibration.text import calibration_ids, needs_text
from fbitrain.checkpoint_files import TrainerState, damage, data_states, trainer_state
from fbitrain.config import Config, to_yaml
from fbitrain.data.loader import TokenLoader
from fbitrain.data.reading.heldout_text import load_heldout
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.debug_logs import BatchLog, DocumentLog
from fbitrain.engine import Engine, shard_teacher
from fbitrain.fine_tune import fine_tuned_student
from fbitrain.inference.evaluate import heldout_windows, predicted_bytes
from fbitrain.loading.language_model import positions_of, vocab_size_of
from fbitrain.loading.pretrained_shape import run_config
from fbitrain.loading.tokenizer_folder import keep_tokenizer
from fbitrain.metrics import IntervalMeans
from fbitrain.metrics_writer import MetricsWriter
from fbitrain.model.build import BinarizeReport, build_student
from fbitrain.model.config import has_signs_of_weights
from fbitrain.optim.schedules import batch_spans
from fbitrain.process import device, resolve_precision
from fbitrain.ranks import agreed, from_rank_0, say
from fbitrain.student import Student
from fbitrain.teacher import Teacher, load_teacher
from fbitrain.tracking import ScaleTracker, SignTracker
from fbitrain.utilization import flops_per_token


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
    teacher: Teacher | None
    tokenizer: Tokenizer
    heldout: HeldoutWindows | None
    loader: TokenLoader
    writer: MetricsWriter
    interval: IntervalMeans
    signs: SignTracker
    scales: ScaleTracker
    flops_per_token: float
    bits_per_weight: float  # of a release: what one binary weight takes, with its share of scales and salient weights
    batch_log: BatchLog | None
    document_log: DocumentLog | None
    blank_batch: Tensor  # int64 [micro_batch_size, seq_len + 1], what a rank whose stream failed goes on with
    rank: int

    def close(self) -> None:
        """Ends the tokenizer processes and writes out what the writer still holds, however the run ended."""
        self.loader.close()
        self.writer.close()


def build(config: Config, rank: int, world_size: int) -> tuple[Parts, TrainerState]:
    """Checks everything that can be checked cheaply, then loads teacher, student and stream, and resumes."""
    transformers.utils.logging.disable_progress_bar()  # every rank would draw its own, for a second's work
    agreed(lambda: prepare_run_dir(config) if rank == 0 else None)
    tokenizer = agreed(lambda: check_vocabularies(config))
    heldout = agreed(lambda: load_windows(config, tokenizer))
    resume_from = choose_checkpoint(config)
    # Opened before anything heavy is loaded: a missing or changed shard is found here.
    loader = agreed(lambda: open_stream(config, tokenizer, rank, world_size, resume_from))
    look = resume_from is None and needs_text(config)
    token_ids = agreed(lambda: calibration_ids(config, tokenizer) if look else None)
    teacher = agreed(lambda: build_teacher(config))
    lm, report = agreed(lambda: build_model(config, resume_from, token_ids))
    say(str(report))
    engine = Engine(config, Student(lm, config.distill))
    state = TrainerState()
    if resume_from:
        if remark := agreed(lambda: resume.restore(engine, resume_from, config.optim.on_change)):
            say(remark)
        state = trainer_state(resume_from)
        engine.shards.changed(state.step)
        say(f"resumed from {resume_from}")
    # Only now, with every check behind us: a launch that is refused leaves the folder of a good run as it was.
    agreed(lambda: record_start(config, world_size, state, tokenizer) if rank == 0 else None)
    at = engine.device
    weights = engine.matrix_weights()
    watched = report.binarized if has_signs_of_weights(config.binarize) else ()
    parts = Parts(
        config=config,
        engine=engine,
        teacher=teacher,
        tokenizer=tokenizer,
        heldout=heldout,
        loader=loader,
        writer=MetricsWriter(config, state.step),
        interval=IntervalMeans(at),
        signs=SignTracker(engine, watched, config.metrics.near_zero, at),
        scales=ScaleTracker(engine, at),
        flops_per_token=flops_per_token(config, weights, teacher.n_parameters if teacher else 0),
        bits_per_weight=report.bits_per_weight,
        blank_batch=torch.zeros(config.train.micro_batch_size, config.data.seq_len + 1, dtype=torch.int64),
        batch_log=BatchLog(config.run_dir, rank) if config.debug.log_batches else None,
        document_log=DocumentLog(config.run_dir, rank) if config.debug.log_documents else None,
        rank=rank,
    )
    return parts, state


def finished(config: Config) -> str:
    """A sentence if the run has nothing left to train, found out before anything is loaded; else empty.

    Raises UserError if the finished run is of another configuration.
    """

    def look() -> str:
        latest = checkpoint_folders.find_latest(config.run_dir) if config.train.resume == "auto" else None
        # By its name first: to look for damage is to read the whole checkpoint, and `choose` will do that again.
        if latest is None or checkpoint_folders.step_of(latest) < config.train.total_steps or damage(latest):
            return ""
        if not config.train.total_steps and not (config.run_dir / "FINISHED.json").is_file():
            return ""  # saved, as its first act, and perhaps killed before it was evaluated
        state = trainer_state(latest)
        resume.require_same_config(latest, config)
        write_finished(config, state)  # again, in case the run was killed between its last checkpoint and its marker
        return f"nothing to do: {config.run_dir} is trained to step {state.step}, see {latest}"

    return from_rank_0(look)


def write_finished(config: Config, state: TrainerState) -> None:
    """The marker of a run that reached its last step; launchers do not pass exit codes on faithfully."""
    marker = {"step": state.step, "tokens": state.tokens, "reason": "finished"}
    write_json(config.run_dir / "FINISHED.json", marker)


def prepare_run_dir(config: Config) -> None:
    """Makes the folder ours, prints the resolved configuration, clears what interrupted saves left. Rank 0."""
    run_dir = config.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not lock_folder(run_dir):
            raise UserError(
                f"{run_dir} is being trained by another process; wait for it or end it, or choose another run.name"
            )
        for leftover in checkpoint_folders.discard_unfinished(run_dir):
            say(f"removed {leftover}, left by an interrupted save")
    except OSError as error:
        raise UserError(
            f"the run folder {run_dir} cannot be written: {error.strerror}; choose another run.dir"
        ) from None
    print(to_yaml(config), flush=True)


def record_start(config: Config, world_size: int, state: TrainerState, tokenizer: Tokenizer) -> None:
    """Saves configuration, environment and tokenizer; sets aside checkpoints that this run leaves behind. Rank 0."""
    run_dir = config.run_dir
    try:
        checkpoint_folders.abandon_newer(run_dir, state.step)
        write_text(run_dir / "config.yaml", to_yaml(config))
        write_json(run_dir / "environment.json", environment.describe(world_size))
        keep_tokenizer(tokenizer, run_dir)
        for marker in ("FINISHED.json", "STOPPED.json"):
            (run_dir / marker).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"the run folder {run_dir} cannot be written: {error.strerror}; free space or choose another"
        ) from None


def check_vocabularies(config: Config) -> Tokenizer:
    """The tokenizer; student, teacher and tokenizer must count the same tokens, and have a position for each."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    problems = list(_too_long(config))
    if config.distill.uses_teacher:
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
    if config.distill.uses_teacher:
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
    )


def load_windows(config: Config, tokenizer: Tokenizer) -> HeldoutWindows | None:
    if not config.eval.every or not config.data.heldout:
        return None
    text = load_heldout(config.data.heldout, tokenizer)
    cut = config.data.seq_len, config.eval.max_tokens
    return HeldoutWindows(heldout_windows(text.token_ids, *cut), predicted_bytes(text, *cut))


def choose_checkpoint(config: Config) -> Path | None:
    """Rank 0 looks, because reading a whole checkpoint to verify it is enough work for one."""
    folder = from_rank_0(lambda: checkpoint_folders.choose(config))
    if folder:
        remark = agreed(lambda: resume.require_same_config(folder, config))
        if remark:
            say(remark)
    return folder


def build_teacher(config: Config) -> Teacher | None:
    distill, model = config.distill, config.model
    if not distill.uses_teacher:
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
