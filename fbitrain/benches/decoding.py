"""How fast whole models run on this CPU: the packed release beside the dense one and llama.cpp, in the same run.

Contenders take turns, so that a busy machine slows them alike; figures are medians over the rounds. In each round a
contender reads a prompt of PROMPT tokens into an empty cache, then, from a cache of FEW tokens, makes its share of
DECODED tokens one by one. The packed release finds the likeliest token after each, as generate.py does; in the rows
"all logits" it computes the logits of the whole vocabulary, as the other contenders do, and leaves it at that.

With one thread times are CPU time, which does not count what other programs take of the core.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.benches import decoding_peers
from fbitrain.model.build import llama_config
from fbitrain.model.compiled import PackedLlama, level_for, why_not_compiled
from fbitrain.model.config import PRESETS, BinarizeConfig, ModelConfig
from fbitrain.model.hf import BinaryLlamaForCausalLM, packed_config
from fbitrain.model.packing import sign_options

PROMPT, DECODED, FEW = 512, 128, 8
MIB = 2**20


class Contender(Protocol):
    """A model that reads token ids."""

    def start(self) -> None:
        """Forgets the text so far."""

    def feed(self, ids: Sequence[int]) -> None:
        """Computes the logits after `ids`, or which is the largest."""


class Packed:
    """A packed folder on the compiled decoder."""

    def __init__(self, model: PackedLlama, all_logits: bool = False) -> None:
        self.model, self.all_logits = model, all_logits
        self.start()

    def start(self) -> None:
        self.text = self.model.continuation(PROMPT + DECODED)

    def feed(self, ids: Sequence[int]) -> None:
        if self.all_logits:
            self.text.logits(list(ids))
        else:
            self.text.likeliest(list(ids))


class Dense:
    """A transformers model in fp32."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.start()

    def start(self) -> None:
        self.cache = None

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> None:
        output = self.model(torch.tensor([list(ids)]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values


@dataclass
class Times:
    """Seconds per token of one contender, a figure per round."""

    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    def rates(self) -> tuple[float, float]:
        """Tokens per second, prefill and decode."""
        return 1 / statistics.median(self.prefill), 1 / statistics.median(self.decode)


def bench(folder: Path | None, preset: str, *, peers: bool, threads: int, rounds: int) -> None:
    """Prints the table for the packed model in `folder`, or for random weights of `preset`."""
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    torch.set_num_threads(threads)
    with TemporaryDirectory(prefix="fbitrain-bench-") as scratch:
        if folder is None:
            folder = Path(scratch) / "packed"
            write_random_packed(folder, ModelConfig(**PRESETS[preset]), BinarizeConfig())
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if why_not := why_not_compiled(config, "cpu", torch.float32, level_for(config)):
            raise UserError(f"{folder} does not run on the compiled decoder: {why_not}")
        print(f"{folder}: {threads} threads, {'CPU' if threads == 1 else 'wall'} time, {rounds} rounds")
        contenders: dict[str, Contender] = {}
        for activations in ("int8", "float"):
            with peak_memory() as peak:
                packed = PackedLlama(folder, config, activations)
                contenders[f"packed, {activations}"] = contender = Packed(packed)
                contender.feed(range(PROMPT))
                for _ in range(DECODED):
                    contender.feed([0])
            embedding = config.vocab_size * config.hidden_size * 2 / MIB
            memory = f"peak memory +{peak():.0f} MiB over the interpreter's (embedding: {embedding:.0f})"
            print(f"packed, {activations}: {memory}")
            contenders[f"packed, {activations}, all logits"] = Packed(packed, all_logits=True)
        contenders["dense fp32 (transformers)"] = Dense(LlamaForCausalLM(config).eval())
        if peers:
            contenders |= _llama_cpp(Path(scratch), config, threads)
        print_rates(in_turns(contenders, config.vocab_size, rounds))


def in_turns(contenders: dict[str, Contender], vocab_size: int, rounds: int) -> dict[str, Times]:
    """Times every contender once per round, in ever another order, after a short warm-up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times = {name: Times() for name in contenders}
    order, generator = list(contenders.items()), random.Random(0)
    prompt = [generator.randrange(vocab_size) for _ in range(PROMPT)]
    for _, contender in order:
        contender.start()
        contender.feed(prompt[:FEW])
    for _ in range(rounds):
        generator.shuffle(order)
        for name, contender in order:
            contender.start()
            times[name].prefill.append(_seconds(contender, prompt, clock) / PROMPT)
            contender.start()
            contender.feed(prompt[:FEW])
            share = prompt[: max(1, DECODED // rounds)]
            times[name].decode.append(sum(_seconds(contender, [token], clock) for token in share) / len(share))
    return times


def _seconds(contender: Contender, ids: Sequence[int], clock: Callable[[], float]) -> float:
    start = clock()
    contender.feed(ids)
    return clock() - start


def print_rates(times: dict[str, Times]) -> None:
    """Tokens per second, and how many times the fastest llama.cpp that is."""
    rates = {name: taken.rates() for name, taken in times.items()}
    peers = [rate for name, rate in rates.items() if name.startswith("llama.cpp")]
    best = [max(column) for column in zip(*peers, strict=True)] if peers else None
    width = max(map(len, rates))
    against = "  of the fastest llama.cpp" if best else ""
    print(f"{'tokens/s':<{width}} {f'prefill {PROMPT}':>12} {f'decode {DECODED}':>12}{against}")
    for name, (prefill, decode) in rates.items():
        ratios = f" {prefill / best[0]:>10.2f}x {decode / best[1]:>10.2f}x" if best else ""
        print(f"{name:<{width}} {prefill:>12.1f} {decode:>12.1f}{ratios}")


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Yields a function that gives, afterwards, how far resident memory rose inside, in MiB; nan where Linux is not."""
    rose = float("nan")
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def field_of(name: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name))

    if not reset.exists():
        yield lambda: rose
        return
    reset.write_text("5")  # proc(5): sets VmHWM to what is resident now
    before = field_of("VmRSS:")
    yield lambda: rose
    rose = (field_of("VmHWM:") - before) / 1024


def write_random_packed(folder: Path, model: ModelConfig, binarize: BinarizeConfig) -> None:
    """A packed folder of `model`'s shape with random bits and weights, without a tokenizer."""
    options = sign_options(binarize.scale, binarize.beta, binarize.group_size)
    config = packed_config(llama_config(model), binarize, "binary", options, {}, bits_per_weight=1.0)
    config.dtype = torch.float16
    with torch.device("meta"):
        expected = BinaryLlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    names = [name for name in expected if not (model.tie_embeddings and name == "lm_head.weight")]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file({name: _random(name, expected[name], generator) for name in names}, folder / "model.safetensors")


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if like.dtype is torch.int32:
        return torch.randint(-(2**31), 2**31, like.shape, dtype=torch.int32, generator=generator)
    drawn = 0.02 * torch.randn(like.shape, generator=generator)
    if name.endswith("alpha"):
        return drawn.abs() + 0.01
    return drawn if name.endswith("beta") else ((1 + drawn) if "norm" in name else drawn).half()


def _llama_cpp(scratch: Path, config: LlamaConfig, threads: int) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    for name in decoding_peers.FORMATS:
        path = scratch / f"{name}.gguf"
        decoding_peers.write_gguf(path, config, name)
        found[f"llama.cpp {name}"] = decoding_peers.LlamaCpp(path, threads, PROMPT + DECODED)
    return found
