"""How many bits a layer's weights take in a release, part by part: by arithmetic, without torch.

Rows of signs are padded to whole 32-bit words. α, β and the like are fp32. A bias is stored in full precision whatever
the method and counts as no part of the weight.
Letters: N out_features, K in_features.
"""

from __future__ import annotations

from fbitrain.kernels.layout import WORD_BITS, n_words
from fbitrain.model.config import BinarizeConfig

SCALE_BITS = 32
VALUE_BITS = {"int8": 8, "float16": 16}
MAX_UINT16_COLUMNS = 2**16  # column indices take 16 bits up to this width, 32 beyond


def storage_bits(binarize: BinarizeConfig, n: int, k: int, n_salient: int | None = None) -> dict[str, int]:
    """Bits by part of a weight [n, k] as `binarize` stores it; nothing is allocated.

    n_salient: how many of its weights are salient; None for what the configured share makes.
    """
    traits = binarize.traits
    n_scales = traits.n_scales(binarize, n, k)
    if traits.salient:
        n_salient = salient_count(binarize, n, k) if n_salient is None else n_salient
        return salient_storage(n, k, n_salient, binarize.salient.dtype, binarize.bits, n_scales)
    router = {"router": binarize.n_experts * k * SCALE_BITS} if traits.routed else {}
    return sign_storage(n, k, n_scales, traits.stored_bits) | router


def salient_count(binarize: BinarizeConfig, n: int, k: int) -> int:
    """Salient weights that the configured share makes of a weight [n, k]."""
    salient = binarize.salient
    if salient.scope == "group":
        return k // binarize.group_size * round(salient.fraction * n * binarize.group_size)
    if salient.scope == "row":
        return n * round(salient.fraction * k)
    return round(salient.fraction * n * k)


def sign_storage(n: int, k: int, n_scales: int, bits: int = 1) -> dict[str, int]:
    """Signs, or codes of several `bits`, and `n_scales` scales."""
    return {"signs" if bits == 1 else "codes": bits * n * n_words(k) * WORD_BITS, "scales": n_scales * SCALE_BITS}


def salient_storage(n: int, k: int, n_salient: int, dtype: str, bits: int, n_scales: int) -> dict[str, int]:
    """Signs (or `bits`-wide codes) of all weights, and the salient ones' places and values.

    The places are a mask or row starts with column indices (csr), whichever is smaller. int8 values have a scale a row.
    """
    mask = n * n_words(k) * WORD_BITS
    csr = 32 * (n + 1) + n_salient * (16 if k <= MAX_UINT16_COLUMNS else 32)
    places = {"mask": mask} if mask <= csr else {"csr": csr}
    value_scales = n if dtype == "int8" else 0
    return sign_storage(n, k, n_scales + value_scales, bits) | places | {"salient": n_salient * VALUE_BITS[dtype]}
