"""What a student is: its shape (ModelConfig), how it is binarized (BinarizeConfig), the named presets. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from fbitrain.base.home import PATH
from fbitrain.model.method_table import METHODS, UNKNOWN, Method

SCALES = ("column", "row", "tensor", "group")
STES = ("identity", "clip")
HESSIAN_SCORES = ("hessian_diagonal", "hessian_cholesky")  # model/salience.py has the formulas
CRITERIA = ("magnitude", "hessian", *HESSIAN_SCORES, "fisher")
CHOLESKY_UP_TO = 0.1  # share of salient weights (docs/finetuning.md, The two Hessian scores)
SCOPES = ("layer", "row", "group")
GRIDS = ("normal", "minmax")
VARIANTS = ("paper", "benchmark")
SALIENT_DTYPES = ("int8", "float16")
MAX_EXPERTS = 64
MAX_BITS = 4


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder. Fields left out of the YAML come from `preset`, then from the defaults here."""

    preset: str = ""  # one of PRESETS; explicit fields win over it
    # Fine-tuning starts from this model, and the sizes below are its own: a Hugging Face folder or hub id, a .gguf
    # file, or a run or checkpoint of ours. Empty: a Llama of the sizes below is trained from scratch.
    pretrained: str = field(default="", metadata=PATH)
    vocab_size: int = 32000  # must equal the teacher's and the tokenizer's
    n_layers: int = 12
    n_heads: int = 12
    n_kv_heads: int = 0  # 0: as many as n_heads (no grouped-query attention)
    d_model: int = 768
    d_ff: int = 2048  # width of the SwiGLU hidden layer
    max_seq_len: int = 2048  # positions the model is built for, in tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    init_std: float = 0.02  # normal initialisation of every matrix


@dataclass(frozen=True)
class SalientConfig:
    """Which weights of a layer stay in high precision, and how; read for methods with salient weights."""

    fraction: float = 0.1  # share of a layer's weights
    # magnitude |w|; hessian (error that binarizing would cause, PB-LLM): the one of hessian_diagonal and
    # hessian_cholesky that `hessian_score` takes; or fisher (squared gradient, CherryQ)
    criterion: str = "magnitude"
    scope: str = "layer"  # the share is the layer's, each row's, or that of each group of binarize.group_size columns
    dtype: str = "int8"  # int8: per row, symmetric, frozen; float16: frozen for partial, trained for cherry

    def hessian_score(self, *, feedback: bool) -> str:
        """The one of HESSIAN_SCORES that `criterion` means; empty if it means none.

        feedback: whether GPTQ-PB solves the layer. Otherwise no later column makes up for an error.
        """
        if self.criterion == "hessian":
            return HESSIAN_SCORES[feedback and self.fraction <= CHOLESKY_UP_TO]
        return self.criterion if self.criterion in HESSIAN_SCORES else ""


@dataclass(frozen=True)
class BinarizeConfig:
    """How Linears become binary: effective weight α·sign(W) + β (docs/design.md, Numbers)."""

    enabled: bool = True  # false trains the full-precision twin, the paper's baseline
    # Phases of precision in one run: the first `from_step` steps train in full precision, the next `anneal_steps` mix
    # full precision and binary in a share that rises from 0 to 1, and all later steps are binary.
    from_step: int = 0
    anneal_steps: int = 0
    method: str = "binary"  # one of METHODS (model/method_table.py)
    # Pattern of α (and β): column [1,K], row [N,1], tensor [1,1], group [N,K/group_size]. Read for method binary, and
    # partial and cherry, which have row or group and no β; every other method has scales of its own.
    scale: str = "column"
    beta: bool = True  # learn the shift β; must be false for scale=group
    group_size: int = 128  # weights per scale along K; only for scale=group and salient.scope=group
    ste: str = "identity"  # straight-through estimator: identity (FBI-LLM) or clip (|w| <= 1); BiBench's have their own
    # Modules kept in full precision, by qualified name or its last component.
    skip: list[str] = field(default_factory=lambda: ["lm_head"])
    salient: SalientConfig = field(default_factory=SalientConfig)
    n_experts: int = 4  # scale experts per layer; only for method=mixture_of_scales
    bits: int = 1  # of the weights that are not salient; only for method=cherry, 1 to 4
    # Step of 2 to 4 bits: normal, the one with the least error for normal weights; or minmax, max |w| / 2^(bits-1), as
    # CherryQ has it. Only for method=cherry.
    grid: str = "normal"
    # Formulas of BiBench's methods: paper, each as its own paper has it; or benchmark, as BiBench's code has it
    # (model/bibench.py).
    variant: str = "paper"
    output_norm: bool = False  # OneBit's LayerNorm, without weights, behind each product; only for method=onebit

    @property
    def traits(self) -> Method:
        """What the table says of the method; for an unknown name, which `binarize_problems` reports, an empty entry."""
        return METHODS.get(self.method, UNKNOWN)

    @property
    def has_fixed_weights(self) -> bool:
        """Whether a layer is a Linear with some weight ŵ, the same for all tokens."""
        return not (self.traits.routed or self.output_norm)


# From arXiv 2407.07093 and the configurations released with it; `tiny` is ours, for the quickstart.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"n_layers": 4, "n_heads": 4, "d_model": 256, "d_ff": 704, "max_seq_len": 2048},
    "130m": {"n_layers": 12, "n_heads": 12, "d_model": 768, "d_ff": 2048, "max_seq_len": 2048},
    "1.3b": {"n_layers": 24, "n_heads": 32, "d_model": 2048, "d_ff": 5632, "max_seq_len": 2048},
    "7b": {"n_layers": 32, "n_heads": 32, "d_model": 4096, "d_ff": 11008, "max_seq_len": 2048},
}


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Yields one sentence per impossible size in `model`."""
    for name in ("vocab_size", "n_layers", "n_heads", "d_model", "d_ff", "max_seq_len"):
        if getattr(model, name) < 1:
            yield f"model.{name}={getattr(model, name)} must be at least 1"
    if model.n_heads > 0:
        if model.d_model % model.n_heads:
            yield f"model.d_model={model.d_model} is not a multiple of model.n_heads={model.n_heads}"
        elif (model.d_model // model.n_heads) % 2:
            head_size = model.d_model // model.n_heads
            yield f"model.d_model/n_heads={head_size} is odd; rotary embeddings need an even head size"
        if model.n_kv_heads < 0 or (model.n_kv_heads and model.n_heads % model.n_kv_heads):
            yield f"model.n_kv_heads={model.n_kv_heads} does not divide model.n_heads={model.n_heads}"
    for name in ("rope_theta", "norm_eps", "init_std"):
        if not getattr(model, name) > 0:
            yield f"model.{name}={getattr(model, name)} must be positive"


def binarize_problems(binarize: BinarizeConfig, model: ModelConfig) -> Iterator[str]:
    """Yields one sentence per contradiction in `binarize`, given the widths of `model`."""
    for name, choices in (
        ("method", METHODS),
        ("scale", SCALES),
        ("ste", STES),
        ("grid", GRIDS),
        ("variant", VARIANTS),
    ):
        value = getattr(binarize, name)
        if value not in choices:
            yield f"binarize.{name}={value!r} is unknown; choose one of {', '.join(choices)}"
    traits = binarize.traits
    if traits.has_pattern:
        yield from _scale_problems(binarize)
    if traits.salient:
        yield from _salient_problems(binarize, model)
    if "n_experts" in traits.settings and not 1 <= binarize.n_experts <= MAX_EXPERTS:
        yield f"binarize.n_experts={binarize.n_experts} must be from 1 to {MAX_EXPERTS}"
    if "bits" in traits.settings and not 1 <= binarize.bits <= MAX_BITS:
        yield f"binarize.bits={binarize.bits} must be from 1 to {MAX_BITS}"
    if binarize.grid == "minmax" and binarize.bits == 1:
        yield "binarize.grid=minmax is of 2 to 4 bits; set binarize.bits, or binarize.grid=normal"
    yield from _unread_settings(binarize)
    if uses_groups(binarize):
        yield from _group_problems(binarize, model)


def _unread_settings(binarize: BinarizeConfig) -> Iterator[str]:
    """One sentence per setting of some method that is given for another one."""
    for name in ("bits", "grid", "variant", "output_norm"):
        value, usual = getattr(binarize, name), getattr(BinarizeConfig, name)
        if value != usual and name not in binarize.traits.settings:
            readers = " or ".join(method for method, traits in METHODS.items() if name in traits.settings)
            yield f"binarize.{name}={value} is for binarize.method={readers}, not {binarize.method}; leave it out"


def uses_groups(binarize: BinarizeConfig) -> bool:
    """Whether group_size is read: for scales per group, or a share of salient weights per group."""
    traits = binarize.traits
    return (traits.has_pattern and binarize.scale == "group") or (
        bool(traits.salient) and binarize.salient.scope == "group"
    )


def has_signs_of_weights(binarize: BinarizeConfig) -> bool:
    """Whether the bits of an ordinary weight are sign(W): not sign(W - mean), three values or more than one bit."""
    traits = binarize.traits
    own = traits.own_signs and (binarize.variant == "paper" or traits.own_signs_in_benchmark)
    return own and binarize.bits == 1


def method_settings(binarize: BinarizeConfig) -> dict[str, Any]:
    """Name -> value of the section's own fields that its method reads, but for skip."""
    names = [*binarize.traits.settings, *(["group_size"] if uses_groups(binarize) else [])]
    return {name: getattr(binarize, name) for name in names}


def settings_read(binarize: BinarizeConfig) -> dict[str, Any]:
    """Dotted key -> value of the section's settings that its method reads, whatever the others are; skip is sorted.

    Phases of precision are left out: they say how a model came to be binary, and not what it then is.
    """
    traits = binarize.traits
    settings: dict[str, Any] = {"enabled": binarize.enabled, "method": binarize.method, "skip": sorted(binarize.skip)}
    settings |= method_settings(binarize)
    if traits.salient:
        settings |= {f"salient.{name}": value for name, value in asdict(binarize.salient).items()}
    return settings


def _scale_problems(binarize: BinarizeConfig) -> Iterator[str]:
    if binarize.traits.salient:
        if binarize.scale not in ("row", "group"):
            yield f"binarize.method={binarize.method} has its scales per row or group; set binarize.scale=row"
        if binarize.beta:
            yield f"binarize.method={binarize.method} has no shift; set binarize.beta=false"
    elif binarize.scale == "group" and binarize.beta:
        yield "binarize.scale=group has no shift (it is the layout of GGUF's Q1_0); set binarize.beta=false"


def _salient_problems(binarize: BinarizeConfig, model: ModelConfig) -> Iterator[str]:
    salient = binarize.salient
    if not 0 < salient.fraction < 1:
        yield f"binarize.salient.fraction={salient.fraction} must lie between 0 and 1, both excluded"
    for name, choices in (("criterion", CRITERIA), ("scope", SCOPES), ("dtype", SALIENT_DTYPES)):
        value = getattr(salient, name)
        if value not in choices:
            yield f"binarize.salient.{name}={value!r} is unknown; choose one of {', '.join(choices)}"
    if salient.scope == "row" and model.d_model and not round(salient.fraction * model.d_model):
        yield (
            f"binarize.salient.scope=row keeps none of a row's model.d_model={model.d_model} weights at "
            f"binarize.salient.fraction={salient.fraction}; raise it, or set binarize.salient.scope=layer"
        )
    if binarize.traits.salient == "trained" and salient.dtype == "int8":
        yield (
            f"binarize.method={binarize.method} trains its salient weights, which int8 cannot; "
            "set binarize.salient.dtype=float16"
        )


def _group_problems(binarize: BinarizeConfig, model: ModelConfig) -> Iterator[str]:
    size = binarize.group_size
    if size < 1:
        yield f"binarize.group_size={size} must be at least 1"
        return
    for name in ("d_model", "d_ff"):
        if getattr(model, name) % size:
            yield f"model.{name}={getattr(model, name)} is not a multiple of binarize.group_size={size}"
