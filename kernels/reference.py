"""Every op in plain torch, for any device and dtype and fast on none: the definition of what the kernels compute.

- sign(w) is +1 for w >= 0 (also for -0.0) and -1 below; it is never 0, so a weight is one bit.
- Bit 1 means +1. Element k of a row is bit k % 32 of word k // 32; bits past K are 0 in every packed tensor.
- The dot product of two ±1 vectors of length K is K - 2·popcount(a ^ b): each differing bit turns a +1 into a -1.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens, G group size, E scaling experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from fbitrain.kernels.checks import not_finite
from fbitrain.kernels.layout import WORD_BITS, n_words
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight

BLOCK_WEIGHTS = 2**20  # the linear ops unpack this many weights at a time (one row at least)


def sign(w: Tensor) -> Tensor:
    """±1 in w's dtype and shape. Not torch.sign, which is 0 at 0."""
    # In place on a copy: converting a bool tensor to floats is several times slower than comparing into floats.
    return w.clone().ge_(0).mul_(2).sub_(1)


def pack_signs(w: Tensor) -> Tensor:
    """The signs of w [..., K] (any float dtype, any strides) as int32 words [..., Kw]."""
    k = w.shape[-1]
    bits = pad((w >= 0).to(torch.int32), (0, n_words(k) * WORD_BITS - k))
    bits = torch.unflatten(bits, -1, (n_words(k), WORD_BITS))
    # The shifted bits are disjoint, so their int32 sum is their "or" and never overflows, bit 31 (the sign) included.
    return torch.bitwise_left_shift(bits, _bit_positions(w.device)).sum(-1, dtype=torch.int32)


def unpack_signs(words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_signs`: int32 words [..., Kw] as contiguous ±1 [..., k] of `dtype`."""
    bits = torch.bitwise_right_shift(words.unsqueeze(-1), _bit_positions(words.device)) & 1
    return bits.flatten(-2)[..., :k].to(dtype).mul_(2).sub_(1).contiguous()


def popcount(words: Tensor) -> Tensor:
    """Set bits of each int32, as int32 of the same shape."""
    # Bit 31 is counted apart, so that no sum below leaves the positive range of int32 (Hacker's Delight, figure 5-2).
    x = words & 0x7FFFFFFF
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x = x + (x >> 8)
    return ((x + (x >> 16)) & 0x3F) + (words < 0).to(torch.int32)


def xnor_gemm(a: Tensor, b: Tensor, k: int) -> Tensor:
    """a [M, Kw] times bᵀ, b [N, Kw], both packed ±1 of length `k`, as int32 [M, N]."""
    differing = a.new_zeros(a.shape[0], b.shape[0])
    for a_M, b_N in zip(a.unbind(1), b.unbind(1), strict=True):  # a word at a time: never more than [M, N] in memory
        differing += popcount(a_M[:, None] ^ b_N)
    return k - 2 * differing


def quantize_int8(z: Tensor) -> tuple[Tensor, Tensor]:
    """z [..., K] as (q int8 [..., K], scale fp32 [..., 1]), z ≈ q·scale, one scale per row: max |z| / 127.

    Rounded to nearest, ties to even. A row whose scale is no normal fp32 number (all zeros, above all) becomes 0 with
    scale 0. Raises ValueError for NaN or infinity.
    """
    z = z.to(torch.float32)
    if not bool(torch.isfinite(z).all()):
        row = int((~torch.isfinite(z)).any(-1).flatten().nonzero()[0])
        raise not_finite(row, z.shape)
    scale = z.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, 0.0, scale)
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return (z * inverse).round().to(torch.int8), scale


def binary_linear(x: Tensor, weight: BinaryWeight, mode: str = "float") -> Tensor:
    """x [..., K] times ŵᵀ: [..., N] in x's dtype.

    α and β are rounded to x's dtype first, as in training. The signs are unpacked a block of rows at a time, so the
    dense weight never exists in memory.

    mode "float" computes in x's dtype. mode "int8" quantizes x (for scale "column" x·α) per token by `quantize_int8`,
    sums in integers and scales the sums in fp32; β is multiplied with x before it was quantized.
    """
    beta = None if weight.beta is None else weight.beta.to(x.dtype)
    weight = weight._replace(alpha=weight.alpha.to(x.dtype), beta=beta)
    multiply = _int8_product if mode == "int8" else _float_product
    return multiply(x.reshape(-1, weight.k), weight).to(x.dtype).reshape(*x.shape[:-1], weight.words.shape[0])


def mixture_linear(x: Tensor, weight: MixtureWeight, mode: str = "float") -> Tensor:
    """((x ∘ (gates·alpha_in)) Sᵀ) ∘ (gates·alpha_out) for x [..., K] and S = sign(W): [..., N] in x's dtype.

    The alphas are rounded to x's dtype, as in training; all else is computed in fp32, or wider if x is. The experts
    are added up in their order, so that the quantized values of mode "int8" (`quantize_int8` of x ∘ (gates·alpha_in))
    are defined to the bit.
    """
    words, gates, alpha_in, alpha_out, k = weight
    wide = torch.promote_types(x.dtype, torch.float32)
    gates_ME = gates.reshape(-1, gates.shape[-1]).to(wide)
    z_MK = x.reshape(-1, k).to(wide) * _mixed(gates_ME, alpha_in.to(x.dtype).to(wide))
    multiply = _int8_product if mode == "int8" else _float_product
    y_MN = multiply(z_MK, BinaryWeight(words, z_MK.new_ones(1, 1), None, "tensor", k))
    y_MN = y_MN * _mixed(gates_ME, alpha_out.to(x.dtype).to(wide))
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], words.shape[0])


def partial_linear(x: Tensor, weight: PartialWeight, mode: str = "float") -> Tensor:
    """x [..., K] times ŵᵀ for a partially binarized weight: [..., N] in x's dtype.

    α is rounded to x's dtype, as in training; all else is computed in fp32, or wider if x is. mode "int8" quantizes x
    per token by `quantize_int8`; the sums of bits and of int8 values are integers, which fp32 scales put together.
    Raises ValueError for entries that are no rows of ascending columns.
    """
    words, _, _, row_starts, columns, values, value_scale, k, _ = weight
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, columns = salient_places(row_starts, columns, k)
    x_MK = x.reshape(-1, k).to(wide)
    x_MK, step = quantize_int8(x_MK) if mode == "int8" else (x_MK, None)
    x_MK = x_MK if step is None else x_MK.double()  # integers, exact in fp64 far beyond int32
    x_MgG = torch.unflatten(x_MK, 1, (-1, weight.groups or k))
    alpha = weight.alpha.to(x.dtype).to(wide)
    y_MN = x_MK.new_empty(x_MK.shape[0], words.shape[0], dtype=wide)
    for block in _row_blocks(words.shape[0], k):
        entries = slice(int(row_starts[block.start]), int(row_starts[min(block.stop, words.shape[0])]))
        places = rows[entries] - block.start, columns[entries]
        signs = unpack_signs(words[block], k, x_MK.dtype).index_put_(places, x_MK.new_zeros(()))
        salient = torch.zeros_like(signs).index_put_(places, values[entries].to(signs.dtype))
        sums_gMn = x_MgG.transpose(0, 1) @ torch.unflatten(signs, 1, x_MgG.shape[1:]).permute(1, 2, 0)
        y_Mn = (sums_gMn.to(wide) * alpha[block].T[:, None]).sum(0)
        salient_Mn = (x_MK @ salient.T).to(wide)
        y_MN[:, block] = y_Mn + (salient_Mn if value_scale is None else salient_Mn * value_scale[block].T.to(wide))
    y_MN = y_MN if step is None else y_MN * step
    return y_MN.to(x.dtype).reshape(*x.shape[:-1], words.shape[0])


def salient_places(row_starts: Tensor, columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Row and column (int64) of each salient weight; ValueError unless the columns of each row ascend within [0, k)."""
    counts, columns = row_starts.diff(), columns.long()
    if int(row_starts[0]) != 0 or int(row_starts[-1]) != len(columns) or bool((counts < 0).any()):
        raise ValueError(f"partial_linear: row_starts must ascend from 0 to the {len(columns)} entries")
    rows = torch.repeat_interleave(counts)
    descends = (columns.diff() <= 0) & (rows.diff() == 0)
    if len(columns) and (bool(descends.any()) or int(columns.min()) < 0 or int(columns.max()) >= k):
        raise ValueError(f"partial_linear: the columns of each row must ascend, from 0 to {k - 1} at most")
    return rows, columns


def _mixed(gates_ME: Tensor, alpha: Tensor) -> Tensor:
    """gates · alpha [E, C], the experts added in their order."""
    total = gates_ME[:, :1] * alpha[0]
    for expert in range(1, alpha.shape[0]):
        total = total + gates_ME[:, expert : expert + 1] * alpha[expert]
    return total


def _float_product(x_MK: Tensor, weight: BinaryWeight) -> Tensor:
    words, alpha, _, scale, k, _ = weight
    left = x_MK * alpha if scale == "column" else x_MK
    y_MN = x_MK.new_empty(x_MK.shape[0], words.shape[0])
    for block in _row_blocks(words.shape[0], k):
        signs = unpack_signs(words[block], k, x_MK.dtype)
        if weight.groups:
            signs = (torch.unflatten(signs, 1, (-1, weight.groups)) * alpha[block, :, None]).flatten(1)
        y_MN[:, block] = left @ signs.T
    return _shifted(y_MN, x_MK, weight)


def _int8_product(x_MK: Tensor, weight: BinaryWeight) -> Tensor:
    beta = None if weight.beta is None else weight.beta.float()
    weight = weight._replace(alpha=weight.alpha.float(), beta=beta)
    words, alpha, _, scale, k, _ = weight
    x_MK = x_MK.float()
    q_MK, scale_M1 = quantize_int8(x_MK * alpha if scale == "column" else x_MK)
    q_MgG = torch.unflatten(q_MK.double(), 1, (-1, weight.groups or k))
    y_MN = x_MK.new_empty(x_MK.shape[0], words.shape[0])
    for block in _row_blocks(words.shape[0], k):
        signs_ngG = torch.unflatten(unpack_signs(words[block], k, torch.float64), 1, q_MgG.shape[1:])
        sums_gMn = q_MgG.transpose(0, 1) @ signs_ngG.permute(1, 2, 0)  # integers, exact in fp64 far beyond int32
        if scale == "group":
            y_MN[:, block] = (sums_gMn.float() * alpha[block].T[:, None]).sum(0)
        else:
            y_MN[:, block] = sums_gMn[0].float()
    return _shifted(y_MN.mul_(scale_M1), x_MK, weight)


def _shifted(y_MN: Tensor, x_MK: Tensor, weight: BinaryWeight) -> Tensor:
    """y·α where α belongs to the rows of the weight, plus the part of β."""
    if weight.scale in ("row", "tensor"):
        y_MN *= weight.alpha.T
    if weight.beta is not None:
        column = weight.scale == "column"
        y_MN += x_MK @ weight.beta.T if column else x_MK.sum(1, keepdim=True) * weight.beta.T
    return y_MN


def _row_blocks(n: int, k: int) -> Iterator[slice]:
    rows = max(1, BLOCK_WEIGHTS // k)
    for start in range(0, n, rows):
        yield slice(start, start + rows)


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(WORD_BITS, dtype=torch.int32, device=device)
