"""How good a model is on a text: perplexity and bits per byte.

The perplexity protocol is GPTQ's and FBI-LLM's (arXiv 2210.17323, 2407.07093): documents joined by a blank line, one
tokenization, windows of seq_len that do not overlap, the tail dropped, and the mean negative log-likelihood of each
window's seq_len - 1 next tokens.

B windows, T seq_len, M tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.data.reading.heldout_text import HeldoutText, load_heldout, read_text, tokenized
from fbitrain.model.compiled import PackedLlama

if TYPE_CHECKING:
    from fbitrain.data.tokenizer import Tokenizer

CHUNK_TOKENS = 512  # tokens whose fp32 logits exist at one time
WIKITEXT_SUFFIXES = (".raw", ".tokens")  # the names under which WikiText is published

Head = Callable[[Tensor], Tensor]  # hidden [M,D] -> logits [M,V]


@dataclass(frozen=True)
class PerplexityResult:
    """What the windows of one text cost a model. nll is in nats; n_tokens counts the tokens that were predicted.

    bits_per_byte does not depend on the tokenizer, so it compares models whose vocabularies differ. Its bytes are
    n_bytes, those of the predicted tokens in the text's UTF-8.
    """

    ppl: float
    nll_per_token: float
    bits_per_byte: float
    n_tokens: int
    n_bytes: int
    n_windows: int


def perplexity(
    model: PreTrainedModel | PackedLlama,
    text: HeldoutText,
    seq_len: int,
    *,
    max_tokens: int | None = None,
    batch_size: int = 1,
) -> PerplexityResult:
    """Perplexity of `model` on the first `max_tokens` tokens (default: all) of `text`.

    Raises UserError if the text is shorter than a window, the window is longer than the model's positions, or the text
    has token ids that the model does not know.
    """
    positions = getattr(model.config, "max_position_embeddings", seq_len)
    if seq_len > positions:
        raise UserError(f"seq_len={seq_len} is more than the model's {positions} positions; choose at most that")
    windows = heldout_windows(text.token_ids, seq_len, max_tokens)
    if int(windows.max()) >= model.config.vocab_size:
        raise UserError(
            f"the text holds token {int(windows.max())}, but the model's vocabulary has {model.config.vocab_size}: "
            "the tokenizer is not the model's"
        )
    nll, n_tokens = nll_of_windows(hidden_and_head(model), windows.to(model.device), batch_size)
    n_bytes = predicted_bytes(text, seq_len, max_tokens)
    return PerplexityResult(
        ppl=perplexity_of(nll / n_tokens),
        nll_per_token=nll / n_tokens,
        bits_per_byte=bits_per_byte(nll, n_bytes),
        n_tokens=n_tokens,
        n_bytes=n_bytes,
        n_windows=len(windows),
    )


def heldout_windows(token_ids: Tensor, seq_len: int, max_tokens: int | None = None) -> Tensor:
    """The first `max_tokens` of token_ids [n] as windows int64 [n // seq_len, seq_len] that do not overlap; no tail.

    Raises UserError if not even one window can be filled.
    """
    if seq_len < 2:
        raise UserError(f"a window of seq_len={seq_len} leaves no token to predict; choose 2 or more")
    ids = torch.as_tensor(token_ids, dtype=torch.int64)[:max_tokens]
    n_windows = len(ids) // seq_len
    if not n_windows:
        mend = "raise max_tokens" if max_tokens is not None and len(token_ids) >= seq_len else "give more text"
        raise UserError(
            f"{len(ids)} tokens of text do not fill a window of seq_len={seq_len}; {mend}, or choose a smaller seq_len"
        )
    return ids[: n_windows * seq_len].view(n_windows, seq_len)


def predicted_bytes(text: HeldoutText, seq_len: int, max_tokens: int | None = None) -> int:
    """UTF-8 bytes of the tokens of `heldout_windows` that are predicted, each window's after its first."""
    return int(heldout_windows(text.token_bytes, seq_len, max_tokens)[:, 1:].sum())


@torch.inference_mode()
def nll_of_windows(
    hidden_and_head: Callable[[Tensor], tuple[Tensor, Head]], windows: Tensor, batch_size: int
) -> tuple[float, int]:
    """Summed negative log-likelihood (nats, in fp64) of each window's tokens after its first, and their number.

    windows: int64 [n,T]. hidden_and_head(ids [B,T]) returns hidden [B,T,D] and the function that makes logits of it;
    that is called on CHUNK_TOKENS tokens at a time, so logits [B,T,V] never exist.
    """
    total = torch.zeros((), dtype=torch.float64, device=windows.device)
    n_tokens = windows.shape[0] * (windows.shape[1] - 1)
    with tqdm(total=n_tokens, desc="perplexity", unit="token", unit_scale=True, leave=False, disable=None) as bar:
        for start in range(0, len(windows), batch_size):
            batch = windows[start : start + batch_size]
            hidden, head = hidden_and_head(batch)
            hidden_M, labels_M = hidden[:, :-1].flatten(0, 1), batch[:, 1:].flatten()
            for at in range(0, len(labels_M), CHUNK_TOKENS):
                chunk = slice(at, at + CHUNK_TOKENS)
                nll_M = F.cross_entropy(head(hidden_M[chunk]).float(), labels_M[chunk], reduction="none")
                total += nll_M.double().sum()
            bar.update(len(labels_M))
    return total.item(), n_tokens


def hidden_and_head(model: PreTrainedModel | PackedLlama) -> Callable[[Tensor], tuple[Tensor, Head]]:
    """What `nll_of_windows` asks of a model."""
    if isinstance(model, PackedLlama):
        return lambda ids: (model.hidden(ids), model.head)
    if isinstance(model, LlamaForCausalLM):
        return lambda ids: (model.model(input_ids=ids, use_cache=False).last_hidden_state, model.lm_head)
    # Other architectures may scale or cap their logits after the head, so those are taken as the model gives them.
    return lambda ids: (model(input_ids=ids, use_cache=False).logits, lambda logits: logits)


def perplexity_of(nll_per_token: float) -> float:
    return math.exp(nll_per_token) if nll_per_token < 700 else math.inf


def bits_per_byte(nll_sum: float, n_bytes: int) -> float:
    """nll_sum nats over predicted tokens of n_bytes, in bits per byte of text."""
    return nll_sum / math.log(2) / n_bytes if n_bytes else math.inf


def load_text(path: Path, tokenizer: Tokenizer) -> HeldoutText:
    """The text of one file, joined and tokenized for `perplexity`.

    .jsonl, .jsonl.gz and .jsonl.zst hold a document per line under "text"; .txt is one document. .raw and .tokens are
    WikiText's: its lines are the documents, as the `datasets` library yields them (a blank one is "", any other keeps
    its newline), which is what published WikiText perplexities were measured on.
    """
    if path.suffix not in WIKITEXT_SUFFIXES:
        return load_heldout([str(path)], tokenizer, "text")
    lines = read_text(path).splitlines(keepends=True)
    return tokenized([line if line.strip() else "" for line in lines], tokenizer, f"text: {path}")
