"""The table of methods: one entry for each value of binarize.method. No torch.

An entry holds every fact about a method that code outside its layer asks for, so that no other file compares names of
methods (tests/test_method_names.py).

Letters: N out_features, K in_features, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from fbitrain.kernels.layout import scale_shape

if TYPE_CHECKING:
    from fbitrain.model.config import BinarizeConfig

Count = Callable[["BinarizeConfig", int, int], int]  # of a layer [n, k]


@dataclass(frozen=True)
class Method:
    """What is true of a method, whichever Linear it is applied to."""

    layer: str  # "file.Class" in model/: a LatentLinear, whose `make` builds a layer and whose `pack` packs it
    paper: str
    weight: str  # what an ordinary weight becomes, for the model card; may name settings, as in {n_experts}
    n_scales: Count  # fp32 scales that a release stores
    # Fields of BinarizeConfig that its layer's constructor takes. group_size is not named: it comes with them where
    # scales or salient weights go by groups (config.method_settings).
    settings: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()  # parameters that are learned scales; () where scales follow from the weights
    buffers: tuple[str, ...] = ()  # persistent buffers of the layer
    levels: int = 2  # values of an ordinary weight, up to its scale, where binarize.bits is 1
    own_signs: bool = True  # the stored bit is the sign of the latent weight, not of a shifted or rounded one
    own_signs_in_benchmark: bool = True  # the same for binarize.variant=benchmark
    salient: Literal["", "frozen", "trained"] = ""  # needs a mask of salient weights, which training leaves or moves
    routed: bool = False  # the parameter `router` [E, K] mixes the scales for each token: there is no fixed ŵ
    int8_activations: bool = False  # each token is rounded to 255 levels before the product

    @property
    def stored_bits(self) -> int:
        """Bits of an ordinary weight, without its scales, where binarize.bits is 1."""
        return (self.levels - 1).bit_length()

    @property
    def has_pattern(self) -> bool:
        """Whether binarize.scale says which weights share a scale."""
        return "scale" in self.settings


def _pattern(binarize: BinarizeConfig, n: int, k: int) -> int:
    rows, columns = scale_shape(binarize.scale, n, k, binarize.group_size)
    return rows * columns


_BIBENCH = partial(
    Method,
    layer="bibench.BiBenchLinear",
    weight="α·sign(W), α the mean of |W| per row",
    n_scales=lambda binarize, n, k: n,
    settings=("method", "variant"),
)
_BITNET = partial(
    Method,
    layer="bitnet.BitNetLinear",
    n_scales=lambda binarize, n, k: 1,
    settings=("method",),
    own_signs=False,
    int8_activations=True,
)
METHODS: dict[str, Method] = {
    "binary": Method(
        layer="linear.BinaryLinear",
        paper="FBI-LLM, autoregressive distillation (arXiv 2407.07093)",
        weight="α·sign(W)",
        n_scales=lambda binarize, n, k: _pattern(binarize, n, k) * (2 if binarize.beta else 1),
        settings=("scale", "beta", "ste"),
        scales=("alpha", "beta"),
    ),
    "partial": Method(
        layer="partial.PartialBinaryLinear",
        paper="PB-LLM, partial binarization (arXiv 2310.00034)",
        weight="α·sign(W)",
        n_scales=_pattern,
        settings=("scale", "ste"),
        buffers=("salient_bits", "salient_values", "salient_scale"),
        salient="frozen",
    ),
    "cherry": Method(
        layer="partial.PartialBinaryLinear",
        paper="CherryQ (arXiv 2404.02837)",
        weight="α·sign(W)",
        n_scales=_pattern,
        settings=("scale", "ste", "bits", "grid"),
        buffers=("salient_bits",),
        salient="trained",
    ),
    "mixture_of_scales": Method(
        layer="mixture.MixtureOfScalesLinear",
        paper="BinaryMoS (arXiv 2406.12311)",
        weight="sign(W) between {n_experts} pairs of input and output scales, mixed for each token by a router",
        n_scales=lambda binarize, n, k: binarize.n_experts * (n + k),
        settings=("ste", "n_experts"),
        scales=("scale_in", "scale_out"),
        routed=True,
    ),
    "onebit": Method(
        layer="mixture.OneBitLinear",
        paper="OneBit (arXiv 2402.11295)",
        weight="sign(W) between one learned scale per input and one per output",
        n_scales=lambda binarize, n, k: n + k,
        settings=("ste", "output_norm"),
        scales=("scale_in", "scale_out"),
    ),
    # bnn has no scale; a release stores one, 1.0.
    "bnn": _BIBENCH(paper="BNN (arXiv 1602.02830)", weight="sign(W)", n_scales=lambda binarize, n, k: 1),
    "xnor": _BIBENCH(paper="XNOR-Net (arXiv 1603.05279)", own_signs_in_benchmark=False),
    "bireal": _BIBENCH(paper="Bi-Real Net (arXiv 1808.00278)"),
    "recu": _BIBENCH(paper="ReCU (arXiv 2103.12369)", own_signs=False),
    "fda": _BIBENCH(paper="FDA-BNN (arXiv 2103.00841)"),
    "bitnet": _BITNET(
        paper="BitNet (arXiv 2310.11453)",
        weight="β·sign(W − mean W), one β per matrix; activations rounded to int8 per token",
    ),
    "ternary": _BITNET(
        paper="BitNet b1.58 (arXiv 2402.17764)",
        weight="γ·(−1, 0 or +1), one γ per matrix; activations rounded to int8 per token",
        levels=3,
    ),
}
# What an unknown name in a configuration stands for until it is reported (config.binarize_problems).
UNKNOWN = Method(layer="", paper="", weight="", n_scales=lambda binarize, n, k: 0)


def _all_of(field: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for method in METHODS.values() for name in getattr(method, field)))


SCALE_NAMES = _all_of("scales")  # of all methods' learned scales
# What a checkpoint holds of a binary layer besides its bias, whatever the method.
TRAINED_NAMES = ("weight", *SCALE_NAMES, "router", *_all_of("buffers"))
