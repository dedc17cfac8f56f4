"""The whole configuration: one tree of frozen, torch-free dataclasses, read from a YAML file and dotted overrides.

Every problem is collected and reported in one ConfigError, before torch is imported.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fbitrain.base.errors import UserError
from fbitrain.base.home import PATH, with_home
from fbitrain.base.settings import ConfigError as ConfigError
from fbitrain.base.settings import read_values, typed
from fbitrain.config_checks import semantic_problems
from fbitrain.config_optim import OptimConfig, with_old_keys
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.streaming.steps import dealt
from fbitrain.loading.pretrained_shape import SIZES, origins, read_shape
from fbitrain.model.config import PRESETS, BinarizeConfig, ModelConfig
from fbitrain.optim.schedules import batch_tokens_at, tokens_after

COMMUNICATION_BUCKET = 2**24  # elements that ranks exchange at a time: 32 MiB in bf16, enough to fill a network


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives: the folder `dir/name`."""

    name: str = "default"
    dir: str = field(default="runs", metadata=PATH)


@dataclass(frozen=True)
class DistillConfig:
    """The loss, a mean over tokens: kd_weight · CE(teacher softmax, student) + ce_weight · CE(labels, student)
    + hidden_weight · Σ over layers of the mean squared difference of both models' hidden states (see hidden_per).
    """

    # A Hugging Face folder or hub id, or a .gguf file; needed unless kd_weight and hidden_weight are 0. Where it is
    # empty, fine-tuning distils the pretrained model itself.
    teacher: str = field(default="", metadata=PATH)
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 0.0  # needs a teacher of the student's depth and width
    # What hidden_weight stands beside: token, the mean of the other terms over tokens; or sequence, their sum over a
    # sequence of T tokens, so that it counts hidden_weight / T beside the mean (BinaryMoS's code, with 10).
    hidden_per: str = "token"
    temperature: float = 1.0  # divides both models' logits in the distillation term, which is scaled by temperature²
    chunk_tokens: int = 512  # tokens whose [chunk, vocab] logits exist at one time
    # A folder of `fbitrain cache-teacher`: its targets in place of the teacher's answers, for data.pretokenized.
    cache: str = field(default="", metadata=PATH)
    cache_gaps: str = "refuse"  # shards without targets: refuse, or teacher, which asks it for sequences that have them
    cache_rest: str = "renormalize"  # of likeliest words, the probability of the others: renormalize, or label
    # replicated: every rank holds the teacher; zero3: ZeRO-3 shards it, for teachers that do not fit.
    host: str = "replicated"
    int8: bool = False  # multiply the teacher's linear layers in int8; its error is printed at the start
    compile: bool = False  # torch.compile the teacher's blocks
    trust_remote_code: bool = False  # run Python code that comes with a teacher from the hub

    def hidden_factor(self, seq_len: int) -> float:
        """What the hidden states' distance counts beside the mean over tokens, for sequences of `seq_len` tokens."""
        return self.hidden_weight / (seq_len if self.hidden_per == "sequence" else 1)

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss asks a teacher anything."""
        return self.kd_weight > 0 or self.hidden_weight > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself is loaded: not where a cache has all its answers."""
        return self.uses_teacher and (not self.cache or self.cache_gaps == "teacher")


@dataclass(frozen=True)
class CalibrationConfig:
    """The text that fine-tuning looks at before its first step, and how: read where binarize.method is partial or
    cherry, for salient.criterion hessian and fisher, and to solve layer by layer (ptq).
    """

    path: str = ""  # a text file or shard; empty: sequences drawn from the training sources
    sources: list[SourceConfig] = field(default_factory=list)  # drawn from instead of data's
    n_sequences: int = 128
    seq_len: int = 0  # tokens; 0: data.seq_len
    damping: float = 0.01  # added to the Hessian's diagonal, as a share of its mean
    ptq: bool = False  # GPTQ-PB: binarize column by column before training; with train.total_steps=0 that is all
    block_size: int = 128  # columns that ptq solves before it updates the rest
    feedback: bool = True  # false: ptq lets no column make up for the error of those before it, and needs no text


@dataclass(frozen=True)
class BatchChange:
    """From a step on, another number of tokens per step."""

    from_step: int = 0  # the first step of this size
    global_batch_tokens: int = 0


@dataclass(frozen=True)
class TrainConfig:
    """How much and in what portions. A step is an optimizer step, nothing else."""

    total_steps: int = 1000  # 0, in fine-tuning only: evaluate and save what the start gives
    micro_batch_size: int = 8  # sequences per rank per forward
    global_batch_tokens: int = 2**19  # tokens per step over all ranks; grad_accum_steps is derived from it
    batch_changes: list[BatchChange] = field(default_factory=list)  # a batch that grows, in the order of their steps
    # auto: from the run's newest complete checkpoint if there is one; never; or a checkpoint folder.
    resume: str = field(default="auto", metadata=PATH)
    # At a loss or gradient that is not finite, or a spike: stop (and save), skip the step, or rewind to the checkpoint
    # before it and leave out all steps since.
    on_spike: str = "stop"
    spike_loss: float = 0.0  # nats above its running mean that make a loss a spike; 0: none does
    spike_grad_norm: float = 0.0  # times its running mean that make a gradient norm a spike; 0: none does
    spike_window: int = 100  # steps of the running means; as many are trained on before one can be a spike
    # Kinds of parameters that stay as the pretrained model has them: any of embeddings (a tied head with them), head,
    # norms, biases, others. They have no gradient and no optimizer state; checkpoints and releases hold them in fp32.
    frozen: list[str] = field(default_factory=list)
    seed: int = 0  # initial weights and sampling
    activation_checkpointing: bool = False  # recompute each block in backward instead of keeping its activations
    compile: bool = False  # torch.compile the student
    # Once steps run: a rank that is at one place for longer, and for longer than three steps, hangs and ends the run.
    collective_timeout_s: float = 300.0


@dataclass(frozen=True)
class EngineConfig:
    """How the run is spread over devices (DeepSpeed)."""

    zero_stage: int = 1  # 0 only with precision=fp32
    # Compute dtype: auto is bf16 where the device multiplies it natively, else fp32. Latent weights are always fp32.
    precision: str = "auto"
    offload_optimizer: bool = False  # keep optimizer state and fp32 weights in host memory (stages 1 to 3)
    # While a run starts, saves or evaluates, a collective that waits longer ends it; see train.collective_timeout_s.
    comm_timeout_s: int = 1800
    threads_per_rank: int = 0  # CPU threads; 0: cores of this node / ranks on it


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay."""

    every: int = 1000  # steps; the last step and a stop also save
    every_minutes: float = 30.0  # and when this long has passed since the last one; 0: by steps alone
    stop_within_s: float = 10.0  # a step that ends later than this after a stop signal is dropped, to be repeated
    margin_s: float = 300.0  # saves and stops this long before the end of a SLURM job's time
    keep: int = 3  # newest complete checkpoints kept; 0 keeps all
    asynchronous: bool = True  # written by another process, out of a copy in the host's memory, while training goes on


@dataclass(frozen=True)
class MetricsConfig:
    """What is logged and how often, to metrics.jsonl and TensorBoard."""

    every: int = 10  # steps between log lines
    near_zero: float = 1e-3  # latent weights with |W| below this are counted as undecided
    peak_tflops: float = 0.0  # per rank; 0: known GPUs are looked up, otherwise MFU is left out and FLOP/s stays


@dataclass(frozen=True)
class EvalConfig:
    """Held-out perplexity and sample texts during training."""

    every: int = 1000  # steps; also before the first and after the last step; 0 never
    max_tokens: int = 65536  # held-out tokens read per evaluation, over all ranks
    prompts: list[str] = field(default_factory=lambda: ["def main("])
    sample_tokens: int = 48  # generated per prompt, greedily


@dataclass(frozen=True)
class DebugConfig:
    """Switches for finding faults, off in real runs."""

    deterministic: bool = False  # torch.use_deterministic_algorithms
    log_batches: bool = False  # write a hash of every micro-batch to batches_rankNNNNN.jsonl in the run folder
    log_documents: bool = False  # write the ids of the documents that begin in each step to documents_rankNNNNN.jsonl
    # [first, last] step of a profile in the run folder's profile/: a trace per rank, on GPUs a snapshot of memory, too.
    profile_steps: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Config:
    """The tree. Field names are the YAML's keys."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    binarize: BinarizeConfig = field(default_factory=BinarizeConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    def grad_accum_steps(self, world_size: int, step: int = 1) -> int:
        """Micro-batches in step `step` (from 1) of the rank that has most, so that all tokens of `train` are seen."""
        before = tokens_after(self.train, step - 1) // self.data.seq_len
        shares = dealt(before % self.data.n_lanes, self.sequences_in(step), self.data.n_lanes, world_size)
        return math.ceil(max(shares) / self.train.micro_batch_size)

    def sequences_in(self, step: int) -> int:
        """Sequences of step `step` (from 1), over all ranks."""
        return batch_tokens_at(self.train, step) // self.data.seq_len


def load_config(path: str | Path, overrides: Sequence[str] = (), *, world_size: int = 1) -> Config:
    """Reads `path` (a YAML file, or the name of a shipped one), applies dotted `overrides` such as `optim.lr=1e-3`, and
    checks the result.

    Raises ConfigError with every problem found: unreadable file, unknown keys (with the nearest field), wrong types,
    impossible or contradictory values for `world_size` ranks.
    """
    problems: list[str] = []
    config, unread = config_from(read_values(path, overrides, problems), problems)
    # A field that could not be read has its default here: what follows from that is no news to the user.
    problems.extend(p for p in semantic_problems(config, world_size) if not any(name in p for name in unread))
    if problems:
        raise ConfigError(str(path), problems)
    return config


def config_from(values: Any, problems: list[str]) -> tuple[Config, list[str]]:
    """The resolved configuration of a file's plain `values`, of this version or an earlier one, and the names of fields
    that could not be read. What is wrong goes to `problems`; whether the values make sense together is not asked.
    """
    if "optim" in values:
        values["optim"] = with_old_keys(values["optim"])
    sizes = {f"model.{name}": size for name, size in _preset_values(values, problems).items()}
    config, unread = typed(Config, values, sizes, problems)
    return _resolved(config), unread


def _resolved(config: Config) -> Config:
    """`config` with what it leaves to others filled in: the teacher, in place of "teacher" the tokenizer's place, and
    in its paths `~`.

    Fine-tuning distils the model that it starts from and has its tokenizer, unless others are named.
    """
    teacher, tokenizer = config.distill.teacher, config.data.tokenizer
    if config.model.pretrained and not teacher:
        teacher, own_tokenizer = origins(config.model.pretrained)
        tokenizer = own_tokenizer if tokenizer == "teacher" else tokenizer
    if tokenizer == "teacher" and teacher:
        tokenizer = teacher
    distill, data = replace(config.distill, teacher=teacher), replace(config.data, tokenizer=tokenizer)
    return with_home(replace(config, distill=distill, data=data))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value of every leaf; lists are leaves."""

    def walk(prefix: str, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, item in value.items():
            if isinstance(item, Mapping):
                yield from walk(f"{prefix}{key}.", item)
            else:
                yield prefix + key, item

    return dict(walk("", dataclasses.asdict(config)))


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) for every leaf that differs."""
    before, after = flatten(old), flatten(new)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _preset_values(values: Any, problems: list[str]) -> Mapping[str, Any]:
    """The model's sizes where the file leaves them out: those of the pretrained model, else of the preset."""
    model = values.get("model")
    model = model if isinstance(model, dict) else {}
    name = model.get("preset")
    if model.get("pretrained"):
        if name:
            problems.append(
                "model.preset and model.pretrained exclude each other; the sizes are the pretrained model's"
            )
        return _pretrained_values(model, problems)
    if not name:
        return {}
    if not isinstance(name, str) or name not in PRESETS:
        problems.append(f"model.preset={name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return {}
    return PRESETS[name]


def _pretrained_values(model: Mapping[str, Any], problems: list[str]) -> Mapping[str, Any]:
    """Sizes that are not known before a model is fetched from the hub are 0; fbitrain.fine_tune fills them in."""
    if all(name in model for name in SIZES):  # a run's own config.yaml: the model need not be there any more
        return {}
    try:
        shape = read_shape(str(model["pretrained"]))
    except UserError as error:
        problems.append(str(error))
        return {}
    problems.extend(
        f"model.{name}={model[name]} contradicts model.pretrained={model['pretrained']}, whose {name} is {size}; "
        "leave it out"
        for name, size in shape.items()
        if name in model and model[name] != size
    )
    return dict.fromkeys(SIZES, 0) | shape
