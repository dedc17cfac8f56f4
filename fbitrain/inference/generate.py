"""Text from a model, piece by piece as it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.model.compiled import PackedLlama

LEAST_TEMPERATURE = 1e-30  # what is smaller takes the most likely token as well, and fp32 may take it for 0


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0 takes the most likely one, and the rest is then unused."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens that hold this share of the probability
    seed: int = 0

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


def stream_text(
    model: PreTrainedModel | PackedLlama, tokenizer: Tokenizer, start: list[int], prompt: str, sampling: Sampling
) -> Iterator[str]:
    """Yields a piece of text per new token, "" while a character's bytes are still coming; ends at the model's EOS.

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
    ids = list(prompt_ids)
    shown = len(tokenizer.decode(ids))
    for token in stream_tokens(model, prompt_ids, sampling):
        ids.append(token)
        # Decoded as a whole, because a character or a leading space may need its neighbours.
        text = tokenizer.decode(ids)
        piece = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[shown:]
        shown += len(piece)
        yield piece
    if rest := tokenizer.decode(ids)[shown:]:
        yield rest


@torch.inference_mode()
def stream_tokens(model: PreTrainedModel | PackedLlama, prompt_ids: list[int], sampling: Sampling) -> Iterator[int]:
    """Yields up to max_new_tokens token ids after `prompt_ids`, without the EOS that ends them.

    It also ends where the model has no positions left. Raises UserError if the prompt alone leaves none.
    """
    limit = getattr(model.config, "max_position_embeddings", math.inf)  # a recurrent model has no such limit
    room = limit - len(prompt_ids)
    if room < 1:
        raise UserError(f"the prompt has {len(prompt_ids)} tokens and fills the model's {limit} positions; shorten it")
    stop = _stop_ids(model)
    n_new = int(min(sampling.max_new_tokens, room))
    next_token = _continuation(model, len(prompt_ids) + n_new, sampling)
    ids = prompt_ids
    for _ in range(n_new):
        token = next_token(ids)
        if token in stop:
            return
        yield token
        ids = [token]


def _continuation(
    model: PreTrainedModel | PackedLlama, n_tokens: int, sampling: Sampling
) -> Callable[[list[int]], int]:
    """A function for one text of up to `n_tokens`: given its next ids, it chooses the one after them."""
    if isinstance(model, PackedLlama):
        text = model.continuation(n_tokens)
        if sampling.temperature == 0:
            return text.likeliest
        next_logits: Callable[[list[int]], Tensor] = text.logits
    else:
        next_logits = _logits_of(model)
    generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
    return lambda ids: choose(next_logits(ids), sampling, generator)


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
