"""Text from a model, piece by piece as it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.inference.detokenize import Detokenizer
from fbitrain.model.compiled import PackedLlama

LEAST_TEMPERATURE = 1e-30  # what is smaller takes the most likely token as well, and fp32 may take it for 0
READ_TOKENS = 256  # of a prompt at once: whoever asked for the text may leave meanwhile


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the most likely one, and the rest is then unused."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens that hold this share of the probability
    seed: int = 0
    logprobs: int | None = None  # tell the chosen token's log probability, and those of this many likeliest

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0 or more; 0 takes the most likely token")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed} must be from 0 to 2**64 - 1")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must not be negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")


class Token(NamedTuple):
    """A chosen token. The log probabilities, in nats and before temperature, are there if `Sampling.logprobs` asks."""

    id: int
    logprob: float = math.nan
    likeliest: tuple[tuple[int, float], ...] = ()  # ids with their log probabilities, the largest first


def stream_text(
    model: PreTrainedModel | PackedLlama, tokenizer: Tokenizer, start: list[int], prompt: str, sampling: Sampling
) -> Iterator[str]:
    """Yields a piece of text per new token (`stream_pieces`). `start` and `prompt` as in `prompt_tokens`."""
    return stream_pieces(model, tokenizer, prompt_tokens(model, tokenizer, start, prompt), sampling)


def stream_pieces(
    model: PreTrainedModel | PackedLlama, tokenizer: Tokenizer, prompt_ids: list[int], sampling: Sampling
) -> Iterator[str]:
    """Yields a piece of text per new token, "" while a character's bytes are still coming; ends at the model's EOS."""
    text = Detokenizer(tokenizer, prompt_ids)
    for token in stream_tokens(model, prompt_ids, sampling):
        yield text.add(token)
    if rest := text.rest():
        yield rest


def prompt_tokens(
    model: PreTrainedModel | PackedLlama, tokenizer: Tokenizer, start: list[int], prompt: str
) -> list[int]:
    """The ids that the model is given for `prompt`. Raises UserError where there are none, or the model lacks some.

    start: what the tokenizer puts before a prompt (`tokenizer_folder.prompt_start`). An empty prompt without it starts
    at the BOS of the model's generation config, as in transformers.
    """
    prompt_ids = start + tokenizer.encode(prompt)
    if not prompt_ids and (bos := model.generation_config.bos_token_id) is not None:
        prompt_ids = [bos]
    if not prompt_ids:
        raise UserError("the prompt is empty and the model has no BOS token to start from; give some text")
    if max(prompt_ids) >= model.config.vocab_size:
        raise UserError(
            f"the prompt holds token {max(prompt_ids)}, but the model's vocabulary has {model.config.vocab_size}: "
            "the tokenizer is not the model's"
        )
    return prompt_ids


def stream_tokens(model: PreTrainedModel | PackedLlama, prompt_ids: list[int], sampling: Sampling) -> Iterator[int]:
    """Yields the ids of `generate_tokens`."""
    return (token.id for token in generate_tokens(model, prompt_ids, sampling))


def room_after(model: PreTrainedModel | PackedLlama, prompt_ids: list[int]) -> float:
    """How many tokens may follow; a recurrent model has no limit. Raises UserError if there is no room for one."""
    limit = getattr(model.config, "max_position_embeddings", math.inf)
    room: float = limit - len(prompt_ids)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens and fills the model's {limit} positions; shorten it")
    return room


@torch.inference_mode()
def generate_tokens(
    model: PreTrainedModel | PackedLlama,
    prompt_ids: list[int],
    sampling: Sampling,
    wanted: Callable[[], bool] = lambda: True,
) -> Iterator[Token]:
    """Yields up to max_new_tokens tokens after `prompt_ids`, without the EOS that ends them.

    It also ends where the model has no positions left, and before the next token once `wanted()` is false; the compiled
    decoder asks that between parts of a long prompt, too. Raises UserError if the prompt alone leaves no position.
    """
    room = room_after(model, prompt_ids)
    stop = _stop_ids(model)
    n_new = int(min(sampling.max_new_tokens, room))
    read, next_token = _continuation(model, len(prompt_ids) + n_new, sampling)
    ids = prompt_ids
    while read and len(ids) > READ_TOKENS and wanted():
        read(ids[:READ_TOKENS])
        ids = ids[READ_TOKENS:]
    for _ in range(n_new):
        if not wanted():
            return
        token = next_token(ids)
        if token.id in stop:
            return
        yield token
        ids = [token.id]


def _continuation(
    model: PreTrainedModel | PackedLlama, n_tokens: int, sampling: Sampling
) -> tuple[Callable[[list[int]], None] | None, Callable[[list[int]], Token]]:
    """Two functions for one text of up to `n_tokens`: one reads ids, if the model can read a prompt in parts; the other
    reads the next ids and chooses the one after them."""
    read: Callable[[list[int]], None] | None = None
    if isinstance(model, PackedLlama):
        text = model.continuation(n_tokens)
        read = text.read
        if sampling.temperature == 0 and sampling.logprobs is None:
            return read, lambda ids: Token(text.likeliest(ids))
        next_logits: Callable[[list[int]], Tensor] = text.logits
    else:
        next_logits = _logits_of(model)
    generator = torch.Generator(device=model.device).manual_seed(sampling.seed)

    def next_token(ids: list[int]) -> Token:
        logits_V = next_logits(ids)
        token = choose(logits_V, sampling, generator)
        return Token(token) if sampling.logprobs is None else _with_logprobs(token, logits_V, sampling.logprobs)

    return read, next_token


def _with_logprobs(token: int, logits_V: Tensor, n_likeliest: int) -> Token:
    logprobs_V = logits_V.log_softmax(dim=0)
    values, ids = logprobs_V.topk(min(n_likeliest, len(logprobs_V)))
    return Token(token, float(logprobs_V[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _logits_of(model: PreTrainedModel) -> Callable[[list[int]], Tensor]:
    """A function for one text: given its next ids, it returns the fp32 logits [V] after them.

    A model without a cache of keys and values, such as Mamba, reads the whole text again for every token.
    """
    cache, seen = None, list[int]()

    def next_logits(ids: list[int]) -> Tensor:
        nonlocal cache
        seen.extend(ids)
        inputs = torch.tensor([seen if cache is None else ids], device=model.device)
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = getattr(output, "past_key_values", None)
        logits: Tensor = output.logits[0, -1].float()
        return logits

    return next_logits


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token by `sampling`, from fp32 logits [V]. Raises UserError where those are not finite."""
    if not logits_V.max().isfinite():
        raise UserError("the model's logits are not finite: its weights or scales are damaged, or training diverged")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    # Of the distances to the largest logit, so that a temperature near 0 makes no infinities of them.
    scaled_V = (logits_V - logits_V.max()) / max(sampling.temperature, LEAST_TEMPERATURE)
    logits, ids = scaled_V.sort(descending=True, stable=True)
    if 0 < sampling.top_k < len(ids):
        logits, ids = logits[: sampling.top_k], ids[: sampling.top_k]
    probabilities = logits.softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities  # the share of the tokens above each one
    kept = probabilities * (before < sampling.top_p)  # the first is always kept
    return int(ids[torch.multinomial(kept, 1, generator=generator)])


def _stop_ids(model: PreTrainedModel | PackedLlama) -> set[int]:
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
