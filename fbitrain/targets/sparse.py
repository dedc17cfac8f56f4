"""Targets of few words each, as the loss takes them: flat arrays over all words of all tokens of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SparseTargets:
    """Of M tokens, weights over a few words each. Token m has the entries ends[m − 1] to ends[m].

    A token's target is Σ weight · one-hot(word) + label_weight · one-hot(label). Its weights need not sum to 1: those
    of draws do so in expectation only, where they carry importance weights. As they are read, ids and weights have the
    few bytes that they are stored in; `to` makes of them what the loss computes with.
    """

    ends_M: Tensor  # int64 on the CPU, whose loop over chunks reads it
    ids_E: Tensor  # int64, or as stored
    weights_E: Tensor  # fp32, or as stored and to be divided
    label_weights_M: Tensor  # fp32
    divisor: float = 1.0  # of stored weights: the number of draws

    @classmethod
    def none(cls, n_tokens: int) -> SparseTargets:
        """Of tokens that have no target: loss and gradient are 0."""
        empty = torch.zeros(0)
        return cls(torch.zeros(n_tokens, dtype=torch.int64), empty.long(), empty, torch.zeros(n_tokens))

    def __len__(self) -> int:
        return len(self.ends_M)

    def to(self, device: torch.device) -> SparseTargets:
        """The same on `device`, ids as int64 and weights as fp32 shares."""
        ids_E, weights_E = self.ids_E.to(device, non_blocking=True), self.weights_E.to(device, non_blocking=True)
        label_weights_M = self.label_weights_M.to(device, non_blocking=True)
        return SparseTargets(self.ends_M, ids_E.long(), weights_E.float() / self.divisor, label_weights_M)

    def rows(self, rows: slice) -> SparseTargets:
        """The tokens `rows`; of the words only views are made."""
        first = int(self.ends_M[rows.start - 1]) if rows.start else 0
        ends = self.ends_M[rows]
        entries = slice(first, int(ends[-1]) if len(ends) else first)
        return SparseTargets(ends - first, self.ids_E[entries], self.weights_E[entries], self.label_weights_M[rows])

    def places(self) -> Tensor:
        """int64 [E]: the token, counted from 0, that each entry belongs to."""
        n_M = torch.diff(self.ends_M, prepend=self.ends_M.new_zeros(1)).to(self.ids_E.device)
        return torch.repeat_interleave(n_M, output_size=len(self.ids_E))
