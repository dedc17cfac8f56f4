"""The model card of a release: what was trained, on what, how good it is, what it weighs, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import try_to_load_from_cache

from fbitrain.base.files import read_json_lines
from fbitrain.calibration.text import needs_text
from fbitrain.config import Config, DistillConfig
from fbitrain.config_optim import describe_optimizer
from fbitrain.loading.pretrained_shape import HUB_ID, is_binary_run
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.hf import ReleasedModel
from fbitrain.model.phases import binary_share, has_phases, unfinished_phase
from fbitrain.optim.schedules import batch_spans

HELDOUT_KEYS = ("heldout/perplexity", "heldout/bits_per_byte")


@dataclass(frozen=True)
class Training:
    """How far a checkpoint got, and the last held-out figures (keys of metrics.jsonl) up to it."""

    step: int
    tokens: int
    heldout: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """What the packed form of a model holds."""

    binary_weights: int
    binary_bits: int  # what they take: signs, rows padded to whole words, scales, and salient weights with their places
    other_weights: int  # embeddings, norms, head, biases
    other_bits: int
    parts: dict[str, int] = field(default_factory=dict)  # binary_bits by kind of tensor

    @classmethod
    def of(cls, model: ReleasedModel) -> Storage:
        """Every tensor counted as it is stored."""
        tensors = model.packed_tensors()
        parts: dict[str, int] = {}
        for layer in model.layers.values():
            for name, tensor in layer.tensors.items():
                parts[name] = parts.get(name, 0) + 8 * tensor.nbytes
        others = [*model.rest, *model.biases]
        return cls(
            binary_weights=model.binary_weights,
            binary_bits=sum(parts.values()),
            other_weights=sum(tensors[name].numel() for name in others),
            other_bits=8 * sum(tensors[name].nbytes for name in others),
            parts=parts,
        )

    @property
    def bits_per_binary_weight(self) -> float:
        return self.binary_bits / self.binary_weights

    @property
    def bits_per_weight(self) -> float:
        """Over the whole model, embeddings included."""
        return (self.binary_bits + self.other_bits) / (self.binary_weights + self.other_weights)


@dataclass(frozen=True)
class Labels:
    """What the hub files a model under; `release` cannot know it."""

    license: str = "unknown"  # the hub's short names: apache-2.0, mit, llama3.2, other
    language: Sequence[str] = ("en",)  # ISO 639 codes of the texts' languages
    base_model: str = ""  # the hub id of the model that fine-tuning began with


def heldout_metrics(run_dir: Path, step: int) -> dict[str, float]:
    """The last held-out figures up to `step` in a run's metrics.jsonl; empty if there are none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return {}
    found: dict[str, float] = {}
    for record in read_json_lines(path):
        if record.get("step", step + 1) <= step:
            found.update({key: record[key] for key in HELDOUT_KEYS if key in record})
    return found


def model_card(
    config: Config,
    training: Training,
    storage: Storage | None,
    files: Mapping[str, str],
    dtype: str,
    model_type: str,
    labels: Labels,
) -> str:
    """README.md of a release, or of one of its formats, as Hugging Face reads it: a YAML header, then Markdown.

    files: where each format that the card is for lies, seen from the card: a folder, "" for the card's own, or a .gguf.
    storage: what packed holds, if that is among them. dtype: of all other weights. model_type: transformers' name of
    the architecture.
    """
    library = "gguf" if list(files) == ["gguf"] else "transformers"
    parts = [_header(config, training, labels, library), _recipe(config, training), _figures(training)]
    if storage is not None and "packed" in files:
        parts.append(_size(storage, dtype))
    parts += [_loading(files, model_type), _limits(config, training, files)]
    return "\n".join(parts)


def _header(config: Config, training: Training, labels: Labels, library: str) -> str:
    pretrained = config.model.pretrained
    kind = "language model" if pretrained else "Llama"
    origin = f"fine-tuned from {pretrained}" if pretrained else "trained from scratch"
    binarize, share = config.binarize, binary_share(config.binarize, training.step)
    tags = ["fbitrain", *(["full-precision"] if share == 0 else [_bits(binarize)] if share == 1 else [])]
    if not binarize.enabled:
        kind = f"A full-precision {kind}, the twin of a 1-bit one"
    elif share == 0:
        kind = f"A full-precision {kind}, from a run before its weights become {_bits(binarize)}"
    elif share < 1:
        kind = f"A {kind} between full precision and {_bits(binarize)} weights"
    else:
        kind = f"A {kind} with {_bits(binarize)} weights"
    tags += ["distillation"] if config.distill.uses_teacher else []
    head = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "license": labels.license,
        "language": list(labels.language),
        "tags": tags,
    }
    if base := labels.base_model or _hub_id(pretrained):
        head |= {"base_model": base, "base_model_relation": "finetune" if training.tokens else "quantized"}
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True, default_flow_style=None)}---
# {config.run.name}

{kind}, {origin} by fbitrain.
"""


def _hub_id(pretrained: str) -> str:
    """`pretrained` if it is the name of a model that was fetched from the hub, and no path; else empty."""
    if not pretrained or Path(pretrained).exists() or not HUB_ID.fullmatch(pretrained):
        return ""
    return pretrained if isinstance(try_to_load_from_cache(pretrained, "config.json"), str) else ""


def _bits(binarize: BinarizeConfig) -> str:
    if binarize.traits.salient:
        return "partially binary"
    return "ternary" if binarize.traits.levels == 3 else "1-bit"


def _teacher(distill: DistillConfig) -> str:
    if not distill.uses_teacher:
        return "none"
    cached = f"targets cached in {distill.cache}" if distill.cache else ""
    return ", ".join(filter(None, (distill.teacher, cached)))


def _loss(config: Config) -> str:
    distill, hidden = config.distill, config.distill.hidden_factor(config.data.seq_len)
    teacher_and_labels = f"{distill.kd_weight:g} · CE(teacher) + {distill.ce_weight:g} · CE(labels)"
    return teacher_and_labels + (f" + {hidden:.3g} · MSE(hidden states)" if hidden else "")


def _recipe(config: Config, training: Training) -> str:
    model, binarize, distill = config.model, config.binarize, config.distill
    rows = {
        "method": binarize.traits.paper if binarize.enabled else "",
        "started from": model.pretrained,
        "layers × width × feed-forward": f"{model.n_layers} × {model.d_model} × {model.d_ff}, {model.n_heads} heads",
        "vocabulary, positions": f"{model.vocab_size}, {model.max_seq_len}",
        "phases": _phases(binarize, training.step),
        "binary weights": _pattern(config) if binary_share(binarize, training.step) else "none",
        "never binary": ", ".join(["embeddings", "norms", *binarize.skip]) if binarize.enabled else "",
        "frozen": ", ".join(config.train.frozen),
        "calibration": _calibration(config),
        "teacher": _teacher(distill),
        "loss": _loss(config),
        "temperature": f"{distill.temperature:g}",
        "steps, tokens": f"{training.step} of {config.train.total_steps}, {training.tokens:,}",
        "batch, sequence": f"{_batch(config)} tokens per step, {config.data.seq_len} tokens",
        "optimizer": describe_optimizer(config.optim),
        "learning rate": f"{config.optim.lr} → {config.optim.min_lr} ({config.optim.schedule}), "
        f"{config.optim.warmup_steps} warm-up steps",
        "data": ", ".join(f"{source.name} ({source.weight:g})" for source in config.data.sources),
    }
    return "## Recipe\n\n| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items() if value)


def _batch(config: Config) -> str:
    """Tokens of the first step, and every later size with the step it begins at."""
    spans = batch_spans(config.train)
    return ", ".join(f"{tokens:,}" + (f" from step {first:,} on" if first > 1 else "") for first, tokens in spans)


def _phases(binarize: BinarizeConfig, step: int) -> str:
    """Of a run that is not binary from its first step on: how far this model is, or how it came to be binary."""
    if unfinished := unfinished_phase(binarize, step):
        return unfinished
    steps = [("in full precision", binarize.from_step), ("mixed", binarize.anneal_steps)]
    told = ", ".join(f"{kind}: {count}" for kind, count in steps if count)
    return f"steps {told}, then binary" if has_phases(binarize) else ""


def _calibration(config: Config) -> str:
    """What this run did to find salient weights and solve its layers; "" where the weights alone said it."""
    looked_at, binarize = config.calibration, config.binarize
    if not binarize.enabled or not binarize.traits.salient:
        return ""
    if is_binary_run(config.model.pretrained):
        return f"none by this run; it has the salient weights that {config.model.pretrained} was given"
    parts = []
    if looked_at.ptq:
        parts.append("GPTQ-PB" if looked_at.feedback else "GPTQ-PB without feedback")
    if needs_text(config):
        parts.append(f"{looked_at.n_sequences} sequences of {looked_at.seq_len or config.data.seq_len} tokens")
    return " on ".join(parts)


def _pattern(config: Config) -> str:
    binarize = config.binarize
    group = f" of {binarize.group_size}" if binarize.scale == "group" else ""
    weight = binarize.traits.weight.format(**vars(binarize))
    if binarize.traits.salient:
        salient = binarize.salient
        share = f"{salient.fraction:g} of the weights, by {salient.criterion} per {salient.scope}, in {salient.dtype}"
        rest = weight if binarize.bits == 1 else f"{2**binarize.bits} levels"
        return f"{share}; the rest {rest}, one scale per {binarize.scale}{group}"
    if binarize.traits.has_pattern:
        shift = " + β" if binarize.beta else ""
        return f"{weight}{shift}, learned per {binarize.scale}{group}; straight-through estimator {binarize.ste}"
    return weight


def _figures(training: Training) -> str:
    if not training.heldout:
        return "## Figures\n\nThis run measured no held-out text; `fbitrain eval FOLDER --ppl NAME=FILE` does.\n"
    rows = "".join(f"| {key.removeprefix('heldout/')} | {value:.4g} |\n" for key, value in training.heldout.items())
    return f"## Figures\n\nOn the run's held-out documents, measured during training:\n\n| | |\n|---|---|\n{rows}"


def _size(storage: Storage, dtype: str) -> str:
    megabytes = (storage.binary_bits + storage.other_bits) / 8e6
    shares = ", ".join(f"{name} {bits / storage.binary_weights:.3f}" for name, bits in storage.parts.items())
    return f"""## Size of packed

{storage.binary_weights:,} binary weights take {storage.bits_per_binary_weight:.3f} bits each, scales included
({shares}).
With the {storage.other_weights:,} weights of embeddings, norms and head in {dtype}, the whole model is
{megabytes:,.1f} MB, {storage.bits_per_weight:.2f} bits per weight.
"""


def _loading(files: Mapping[str, str], model_type: str) -> str:
    lines = ["## Loading", ""]
    if "dense" in files or "packed" in files:
        lines += ["REPO is this repository's name on the hub, or the path of this card's folder.", ""]
    if "dense" in files:
        lines += ["`dense` needs transformers only:", "", _snippet(files["dense"], ""), ""]
    if "packed" in files:
        lines += [
            "`packed` runs the `remote_code.py` beside this card (plain torch), or, where fbitrain is installed,",
            f'`fbitrain.model.hf.register("{model_type}")` first and leave `trust_remote_code` out:',
            "",
            _snippet(files["packed"], ", trust_remote_code=True"),
            "",
        ]
    if "gguf" in files:
        lines += [f"`gguf` is for llama.cpp: `llama-cli -m {files['gguf']} -p ...`", ""]
    return "\n".join(lines)


def _snippet(folder: str, option: str) -> str:
    place = f', subfolder="{folder}"' if folder else ""
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(REPO{place}{option})
tokenizer = AutoTokenizer.from_pretrained(REPO{place})
inputs = tokenizer(["The first prompt", "Another one"], padding=True, return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32)))
```"""


def _limits(config: Config, training: Training, files: Mapping[str, str]) -> str:
    nature = "A base model: it continues text, and was not tuned to follow instructions or to be safe."
    if config.model.pretrained:
        nature = f"It has the limits of {config.model.pretrained}, whose licence may bind its use too."
    lines = ["## Limits", "", nature, "Its teacher's and its data's licences may bind its use."]
    if config.data.add_bos:
        lines.append("Training put BOS before each document. The tokenizer puts it before each prompt too.")
    rounded = binary_share(config.binarize, training.step) and config.binarize.traits.int8_activations
    if rounded and "dense" in files:
        lines.append("`dense` has the weights but not the rounding of activations to int8 that training had.")
    if "packed" in files:
        lines.append("In plain torch `packed` saves memory, not time: it unpacks its bits at every call.")
    return "\n".join(lines) + "\n"
