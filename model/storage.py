"""How many bits a layer's weights take in a release, part by part: by arithmetic, without torch.

Rows of signs are padded to whole 32-bit words. α, β and the like are fp32. A bias is stored in full precision whatever
the method and counts as no part of the weight.
Letters: N out_features, K in_features, G group size, E experts.
"""

from __future__ import annotations

from fbitrain.kernels.layout import WORD_BITS, n_words, scale_shape
from fbitrain.model.config import BIBENCH_METHODS, SALIENT_METHODS, BinarizeConfig

SCALE_BITS = 32
VALUE_BITS = {"int8": 8, "float16": 16}
MAX_UINT16_COLUMNS = 2**16  # column indices take 16 bits up to this width, 32 beyond


def storage_bits(binarize: BinarizeConfig, n: int, k: int) -> dict[str, int]:
    """Bits by part of a weight [n, k] as `binarize` stores it; nothing is allocated."""
    method = binarize.method
    if method == "binary":
        rows, columns = scale_shape(binarize.scale, n, k, binarize.group_size)
        return sign_storage(n, k, rows * columns * (2 if binarize.beta else 1))
    if method in SALIENT_METHODS:
        rows, columns = scale_shape(binarize.scale, n, k, binarize.group_size)
        n_salient = salient_count(binarize, n, k)
        return salient_storage(n, k, n_salient, binarize.salient.dtype, binarize.bits, rows * columns)
    if method == "mixture_of_scales":
        return mixture_storage(n, k, binarize.n_experts)
    if method == "onebit":
        return sign_storage(n, k, n + k)
    if method in BIBENCH_METHODS:
        return sign_storage(n, k, bibench_scales(method, n))
    return bitnet_storage(method, n, k)


def salient_count(binarize: BinarizeConfig, n: int, k: int) -> int:
    """Salient weights that the configured share makes of a weight [n, k]."""
    salient = binarize.salient
    if salient.scope == "group":
        return k // binarize.group_size * round(salient.fraction * n * binarize.group_size)
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


def mixture_storage(n: int, k: int, n_experts: int) -> dict[str, int]:
    """Signs, a row and a column of scales for each expert, and the router [E, K]."""
    return sign_storage(n, k, n_experts * (n + k)) | {"router": n_experts * k * SCALE_BITS}


def bibench_scales(method: str, n: int) -> int:
    """How many scales a BiBench method gives `n` rows: one each; bnn has none, for which a release stores one 1.0."""
    return 1 if method == "bnn" else n


def bitnet_storage(method: str, n: int, k: int) -> dict[str, int]:
    """bitnet: signs and one scale; ternary: two bits a weight and one scale."""
    return sign_storage(n, k, 1, 2 if method == "ternary" else 1)
