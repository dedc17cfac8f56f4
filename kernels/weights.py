"""The weights that the linear ops multiply with. The fields are in the order of the operators' schemas (ops.py).

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, G group size, E scaling experts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BinaryWeight(NamedTuple):
    """ŵ = α·sign(W) + β, [N, K]."""

    words: Tensor  # int32 [N, Kw]: the packed signs of W
    alpha: Tensor  # float, of `layout.scale_shape(scale, N, k, group_size)`
    beta: Tensor | None  # float, of the same shape; None: no shift, as always with scale "group"
    scale: str  # of layout.SCALES
    k: int  # K
    group_size: int = 0  # G; read for scale "group" only

    @property
    def groups(self) -> int:
        """G if groups of columns have scales of their own, otherwise 0."""
        return self.group_size if self.scale == "group" else 0


class MixtureWeight(NamedTuple):
    """The weight of BinaryMoS (arXiv 2406.12311): for each token it is (gates·alpha_out)[n] · sign(W)[n, k] ·
    (gates·alpha_in)[k], because each token has gates of its own."""

    words: Tensor  # int32 [N, Kw]
    gates: Tensor  # fp32 [..., E], one row for each token of x [..., K]: the router's softmax
    alpha_in: Tensor  # float [E, K]
    alpha_out: Tensor  # float [E, N]
    k: int  # K

    @property
    def groups(self) -> int:
        """0: the scales belong to whole rows and columns."""
        return 0


class PartialWeight(NamedTuple):
    """The weight of PB-LLM (arXiv 2310.00034), [N, K]: α·sign(W) except for salient entries, kept in compressed rows.

    The entries of row n are numbers row_starts[n] to row_starts[n + 1] - 1 of `columns`, which ascend within the row,
    and of `values`. An int8 value is multiplied with value_scale[n]; a float16 value is the weight itself. The bits at
    the places of salient entries are ignored.
    """

    words: Tensor  # int32 [N, Kw]
    alpha: Tensor  # float: [N, 1] for scale "row", [N, K / G] for "group"
    scale: str
    row_starts: Tensor  # int32 [N + 1]
    columns: Tensor  # [entries], uint16 up to K = layout.NARROW_COLUMNS, int32 beyond
    values: Tensor  # [entries], int8 or float16
    value_scale: Tensor | None  # fp32 [N, 1] for int8 values, None for float16
    k: int  # K
    group_size: int = 0  # G; read for scale "group" only

    @property
    def groups(self) -> int:
        """G if groups of columns have scales of their own, otherwise 0."""
        return self.group_size if self.scale == "group" else 0
