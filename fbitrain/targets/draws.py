"""From a teacher's logits to targets of few words: draws from its softmax, or its likeliest words.

Draws are an unbiased estimate of the teacher's distribution, so that the expectation of the loss's gradient is that of
the whole distribution's; the likeliest words are not (Sparse Logit Sampling, arXiv 2503.16870).

Letters: R tokens of a tile, V vocabulary, N draws or words per token, E words of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fbitrain.targets.cache_folder import CacheSettings
from fbitrain.targets.frames import Targets
from fbitrain.targets.tiles import tile_rows


@dataclass(frozen=True)
class Drawing:
    """How targets are made; `targets(logits, …)` does it."""

    settings: CacheSettings

    @property
    def n_uniforms(self) -> int:
        """Random numbers that a token needs."""
        if self.settings.kind == "top":
            return 0
        return 1 if self.settings.systematic else self.settings.n

    def uniforms(self, n_tokens: int, *key: object) -> npt.NDArray[np.float64]:
        """[n_tokens, n_uniforms] in [0, 1): a function of the seed and `key` alone, whatever was drawn before."""
        entropy = [self.settings.seed, *"/".join(map(str, key)).encode()]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).random(
            (n_tokens, self.n_uniforms)
        )

    def targets(self, logits: Callable[[slice], Tensor], uniforms: Tensor, chunk_tokens: int) -> Targets:
        """The targets of len(uniforms) tokens; `logits(rows)` gives those of some of them, [C, V], `chunk_tokens` at a
        time. uniforms: fp64 on the logits' device.
        """
        found: list[Targets] = []
        for start in range(0, len(uniforms), chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, len(uniforms)))
            logits_CV, uniforms_C = logits(rows), uniforms[rows]
            tile = tile_rows(logits_CV.shape[1], logits_CV.device)
            for at in range(0, len(logits_CV), tile):
                found.append(self._tile(logits_CV[at : at + tile].float(), uniforms_C[at : at + tile]))
        return Targets(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))

    def _tile(self, logits_RV: Tensor, uniforms: Tensor) -> Targets:
        settings = self.settings
        if settings.kind == "top":
            probability, ids = torch.softmax(logits_RV, dim=1).topk(settings.n, dim=1)
            order = ids.argsort(dim=1)
            return _every_word(ids.gather(1, order), probability.gather(1, order), settings)
        tempered_RV = logits_RV if settings.temperature == 1 else logits_RV / settings.temperature
        drawn_RN = draw(torch.softmax(tempered_RV, dim=1), uniforms, settings.n)
        if settings.temperature == 1:
            return _distinct(drawn_RN, None, settings)
        importance_RN = torch.exp(_log_softmax(logits_RV, drawn_RN) - _log_softmax(tempered_RV, drawn_RN))
        return _distinct(drawn_RN, importance_RN, settings)


def draw(probability_RV: Tensor, uniforms: Tensor, n: int) -> Tensor:
    """`n` words per row, int64 [R, n] ascending, each drawn with its probability; rows need not sum to exactly 1.

    uniforms [R, n] give independent draws. [R, 1] give systematic ones: (i + u) / n for i = 0 … n − 1, so that a word
    of probability p is drawn ⌊np⌋ or ⌈np⌉ times, np in the mean.
    """
    # In fp64: in fp32 the sum over a vocabulary would lose the words of little probability.
    cumulated_RV = torch.cumsum(probability_RV, dim=1, dtype=torch.float64)
    if uniforms.shape[1] == 1:
        uniforms = (torch.arange(n, dtype=torch.float64, device=uniforms.device) + uniforms) / n
    else:
        uniforms = uniforms.sort(dim=1).values
    # right: the first word whose cumulated probability is above the number, so that none of probability 0 is drawn.
    found = torch.searchsorted(cumulated_RV, uniforms * cumulated_RV[:, -1:], right=True)
    return found.clamp_(max=probability_RV.shape[1] - 1)


def _log_softmax(logits_RV: Tensor, ids_RN: Tensor) -> Tensor:
    return logits_RV.gather(1, ids_RN) - torch.logsumexp(logits_RV, dim=1, keepdim=True)


def _distinct(drawn_RN: Tensor, importance_RN: Tensor | None, settings: CacheSettings) -> Targets:
    """Each word once, with the number of its draws, or that times its importance."""
    drawn = drawn_RN.cpu().numpy()
    new = np.ones(drawn.shape, bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    at = np.flatnonzero(new)
    counts = np.diff(np.append(at, drawn.size))
    weights = counts
    if importance_RN is not None:
        weights = np.minimum(counts * importance_RN.cpu().numpy().reshape(-1)[at], np.finfo(np.float16).max)
    return Targets(
        new.sum(axis=1).astype(np.uint8), drawn.reshape(-1)[at].astype(np.uint32), weights.astype(settings.weight_dtype)
    )


def _every_word(ids_RN: Tensor, weights_RN: Tensor, settings: CacheSettings) -> Targets:
    n = np.full(len(ids_RN), ids_RN.shape[1], np.uint8)
    ids, weights = (tensor.cpu().numpy().reshape(-1) for tensor in (ids_RN, weights_RN))
    return Targets(n, ids.astype(np.uint32), weights.astype(settings.weight_dtype))
