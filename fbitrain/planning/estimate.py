"""What a run takes, by arithmetic: memory per rank, tokens per step. Nothing is allocated, torch is not imported.

P parameters, L layers, D d_model, F d_ff, V vocabulary, M tokens of a micro-batch, W world_size, c bytes of the compute
dtype. Figures are bytes. Activations are an estimate (HF's Llama block, counted tensor by tensor); the rest is exact up
to padding and allocator rounding.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbitrain.config import COMMUNICATION_BUCKET, Config
from fbitrain.model.config import ModelConfig
from fbitrain.optim.schedules import tokens_after

COMPUTE_BYTES = {"bf16": 2, "fp32": 4}
CHECKPOINT_BYTES = 12  # per parameter: an fp32 weight and its two Adam moments; 4 less where Muon keeps one number
RUNTIME_BYTES = 600_000_000  # interpreter, torch, DeepSpeed and transformers, or a CUDA context with its libraries
WRITER_BYTES = 38_000_000  # the process that writes a rank's checkpoints: interpreter and numpy
START_COPIES = 2  # of the fp32 model, whole, in a rank's memory while it is made: 1.74 measured at P = 2.2·10⁸


@dataclass(frozen=True)
class TeacherSize:
    """A teacher as far as memory is concerned."""

    n_parameters: int
    d_model: int


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds at its peak, by purpose; `start` is not held in a step."""

    weights: int  # what the forward multiplies with, in the compute dtype
    gradients: int
    optimizer: int  # fp32 latent weights, Adam's moments or Muon's momentum, and fp32 gradients of this rank's part
    buckets: int  # DeepSpeed's communication buffer
    activations: int
    loss: int  # logits of one chunk of student and teacher, and the gradients of hidden states and head
    teacher: int  # its weights and hidden states; 0 without a teacher, or where its size is unknown
    runtime: int
    start: int  # of the host, before the first step
    save: int  # of the host: the copy of this rank's weights and optimizer state, or of its largest tensor
    optimizer_on_host: bool
    save_is_kept: bool  # from the first save on, in steps too: checkpoint.asynchronous

    @property
    def total(self) -> int:
        """All that a step takes, wherever it lies."""
        parts = (self.weights, self.gradients, self.optimizer, self.buckets, self.activations, self.loss, self.teacher)
        return sum(parts) + self.runtime

    @property
    def on_device(self) -> int:
        """What must fit the rank's own device."""
        return self.total - (self.optimizer if self.optimizer_on_host else 0)

    def on_host(self, *, on_gpu: bool) -> int:
        """What must fit the host's memory at the rank's peak: at its start, in a step, or in a save."""
        passing = 0 if on_gpu else self.activations + self.loss  # gone when a save begins
        held = self.total - (self.on_device if on_gpu else passing + self.runtime)
        in_run = passing + self.save if self.save_is_kept else max(passing, self.save)
        return self.runtime + max(self.start, held + in_run)


def rank_memory(
    config: Config,
    n_parameters: int,
    *,
    n_muon: int = 0,
    n_frozen: int = 0,
    world_size: int,
    precision: str,
    teacher: TeacherSize | None,
) -> RankMemory:
    """The peak of one rank of `world_size` for a student of `n_parameters`; `precision` is bf16 or fp32.

    `n_muon` of the parameters have Muon, which keeps one number for each, not two; `n_frozen` are not trained.
    """
    stage, c = config.engine.zero_stage, COMPUTE_BYTES[precision]
    tokens = config.train.micro_batch_size * config.data.seq_len

    def part(first_stage: int, count: int = n_parameters - n_frozen) -> int:
        """Elements a rank keeps of `count`, by default all that are trained; ZeRO partitions from `first_stage` on."""
        return math.ceil(count / world_size) if stage >= first_stage else count

    of_muon = math.ceil(n_muon / world_size) if stage >= 1 else n_muon
    optimizer = 8 * part(1) - 4 * of_muon
    if stage >= 1:
        optimizer += 4 * part(1)  # DeepSpeed's own fp32 copy, also when it computes in fp32
        optimizer += 4 * part(1) if precision == "bf16" else 0
    return RankMemory(
        weights=c * part(3, n_parameters),
        gradients=c * part(2),
        optimizer=optimizer,
        buckets=(4 if stage == 1 else c) * COMMUNICATION_BUCKET if stage >= 1 else 0,  # stage 1 adds gradients in fp32
        activations=activation_bytes(config.model, tokens, c, checkpointing=config.train.activation_checkpointing),
        loss=_loss_bytes(config, tokens, c),
        teacher=_teacher_bytes(config, tokens, c, world_size, teacher) if config.distill.needs_teacher else 0,
        runtime=RUNTIME_BYTES,
        start=START_COPIES * 4 * n_parameters,
        save=_save_bytes(config, CHECKPOINT_BYTES * part(1) - 4 * of_muon),
        optimizer_on_host=config.engine.offload_optimizer,
        save_is_kept=config.checkpoint.asynchronous,
    )


def activation_bytes(model: ModelConfig, tokens: int, compute_bytes: int, *, checkpointing: bool) -> int:
    """What the blocks of a Llama keep for backward, for `tokens` tokens.

    Per token and block: two norms (fp32 input, normalised and scaled output), rotated q and k, v, attention output in
    both layouts, and four tensors of the SwiGLU. A BinaryLinear keeps only its input, which its neighbours hold anyway.
    """
    width, c = model.d_model, compute_bytes
    kv_width = width // model.n_heads * (model.n_kv_heads or model.n_heads)
    norms = 2 * (4 + 2 * c) * width
    attention = c * (3 * width + 2 * kv_width)
    feed_forward = 4 * c * model.d_ff
    block = tokens * (norms + attention + feed_forward)
    if not checkpointing:
        return model.n_layers * block
    return model.n_layers * tokens * c * width + block  # every block's input, and one block at a time recomputed


def tokens_in_total(config: Config) -> int:
    """Tokens the student is trained on from the first to the last step."""
    return tokens_after(config.train, config.train.total_steps)


def read_teacher_size(folder: Path) -> TeacherSize:
    """The size of a Hugging Face folder's model, from its config.json and the headers of its safetensors files.

    Raises ValueError when the folder holds no safetensors, and OSError or KeyError when it is damaged.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no .safetensors file")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = {name: entry["shape"] for file in files for name, entry in _safetensors_header(file).items()}
    return TeacherSize(sum(math.prod(shape) for shape in shapes.values()), int(config["hidden_size"]))


def _safetensors_header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


def _save_bytes(config: Config, of_rank: int) -> int:
    """`of_rank`: what the rank writes into a checkpoint; where training waits for that, the copy is of one tensor."""
    if config.checkpoint.asynchronous:
        return of_rank + WRITER_BYTES
    return min(of_rank, 4 * config.model.vocab_size * config.model.d_model)


def _loss_bytes(config: Config, tokens: int, c: int) -> int:
    chunk = min(config.distill.chunk_tokens, tokens)
    models = 2 if config.distill.kd_weight > 0 else 1
    logits = (models + 1) * 4 * chunk * config.model.vocab_size  # fp32, and one buffer of the same size to work in
    return logits + 4 * config.model.vocab_size * config.model.d_model + c * tokens * config.model.d_model


def _teacher_bytes(config: Config, tokens: int, c: int, world_size: int, teacher: TeacherSize | None) -> int:
    if teacher is None:
        return 0
    parts = world_size if config.distill.host == "zero3" else 1
    states = config.model.n_layers if config.distill.hidden_weight > 0 else 1  # hidden states that are kept
    return math.ceil(c * teacher.n_parameters / parts) + states * c * tokens * teacher.d_model
