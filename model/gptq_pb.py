"""GPTQ-PB: partial binarization of one trained layer, without training (PB-LLM, arXiv 2310.00034).

GPTQ's solver (arXiv 2210.17323) goes through the columns in order. Each is replaced by its quantized values, and the
later columns take up the error so that the layer's output changes least. Here the quantizer is partial: salient weights
keep 8 bits on a grid per row (or fp16), every other one becomes α·sign(w).

Letters: N out_features, K in_features, G group size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fbitrain.kernels.layout import scale_shape
from fbitrain.model.binarize import sign
from fbitrain.model.hessian import inverse_factor
from fbitrain.model.partial import INT8_MAX, ordinary_alpha, quantize_salient


@dataclass(frozen=True)
class PartialWeights:
    """A partially binarized layer: what a PartialBinaryLinear is made from, with the same effective weight.

    An ordinary (not salient) entry of `weight` is the value that error feedback had brought it to when it was made a
    sign, times the factor that makes the mean |weight| of its row's (or group's) ordinary entries the α of the solver.
    So α follows from the latent weight, as in training, which can begin right here.
    """

    mask: Tensor  # bool [N, K], True where salient
    weight: Tensor  # fp32 [N, K]: ordinary weights latent, salient ones as they are stored
    alpha: Tensor  # fp32 [N, 1], or [N, K/G]: ordinary_alpha(weight, mask, G)
    codes: Tensor | None  # int8 [N, K], 0 off the mask; None where salient weights are fp16
    scale: Tensor | None  # fp32 [N, 1], of the codes

    def effective_weight(self) -> Tensor:
        """ŵ, fp32 [N, K]."""
        k_per_alpha = self.weight.shape[1] // self.alpha.shape[1]
        alpha_NK = self.alpha.repeat_interleave(k_per_alpha, dim=1)
        return torch.where(self.mask, self.weight, alpha_NK * sign(self.weight))


@torch.no_grad()
def gptq_partial(
    w_NK: Tensor,
    hessian_KK: Tensor | None,
    mask_NK: Tensor,
    *,
    group_size: int = 0,
    salient_dtype: str = "int8",
    damping: float = 0.01,
    block_size: int = 128,
) -> PartialWeights:
    """Partially binarizes w [N, K], whose salient weights are where mask (bool [N, K]) is True.

    hessian_KK: mean of x xᵀ over calibration tokens (`HessianSum`); computation is in its dtype. None switches error
        feedback off: each weight is rounded by itself.
    group_size: α per row and group of that many columns; 0 is one α per row. A row's α is fixed before the first
        column, a group's when the solver reaches it.
    salient_dtype: "int8", on a grid per row that is fixed at the start (values that feedback moves past its end are
        clipped), or "float16".
    damping: share of mean(diag H) added to the diagonal. Dead inputs' weights are quantized as they are: the
        calibration text says nothing about them. block_size: columns between two updates of all later ones.

    Raises ValueError if group_size does not divide K or shapes do not fit, SingularHessianError for a useless Hessian.
    """
    if mask_NK.shape != w_NK.shape or mask_NK.dtype != torch.bool:
        raise ValueError(f"mask must be bool {list(w_NK.shape)}, not {mask_NK.dtype} {list(mask_NK.shape)}")
    n, k = w_NK.shape
    scale_shape("group", n, k, group_size or k)
    dtype = torch.float32 if hessian_KK is None else hessian_KK.dtype
    w_NK = w_NK.detach().to(dtype, copy=True)
    step_N1 = quantize_salient(w_NK, mask_NK)[1].to(dtype) if salient_dtype == "int8" else None
    if hessian_KK is None:
        alpha = ordinary_alpha(w_NK, mask_NK, group_size)
    else:
        factor = inverse_factor(hessian_KK, damping)
        alpha = _feed_errors_back(w_NK, mask_NK, factor, step_N1, group_size or k, block_size)
    return _partial_weights(w_NK, mask_NK, alpha, step_N1)


def _feed_errors_back(
    w_NK: Tensor, mask_NK: Tensor, factor_KK: Tensor, step_N1: Tensor | None, group_size: int, block_size: int
) -> Tensor:
    """The solver. Leaves in w each weight as it was when its column was quantized; returns α [N, K/G]."""
    alphas = []
    for group in _slices(0, w_NK.shape[1], group_size):
        alpha_N1 = ordinary_alpha(w_NK[:, group], mask_NK[:, group])
        alphas.append(alpha_N1)
        # A block ends where its group does, so that the next group's α sees every error before it.
        for block in _slices(group.start, group.stop, block_size):
            errors = _quantize_block(w_NK[:, block], mask_NK[:, block], factor_KK[block, block], step_N1, alpha_N1)
            w_NK[:, block.stop :].addmm_(errors, factor_KK[block, block.stop :], alpha=-1)
    return torch.cat(alphas, dim=1)


def _quantize_block(
    w_NB: Tensor, mask_NB: Tensor, factor_BB: Tensor, step_N1: Tensor | None, alpha_N1: Tensor
) -> Tensor:
    """Columns of one block in order, each error fed into those after it in place; returns the errors / U_ii, [N, B]."""
    errors_NB = torch.empty_like(w_NB)
    for i in range(w_NB.shape[1]):
        w_N1 = w_NB[:, i : i + 1]
        quantized = torch.where(mask_NB[:, i : i + 1], _rounded(w_N1, step_N1), alpha_N1 * sign(w_N1))
        error_N1 = (w_N1 - quantized) / factor_BB[i, i]
        w_NB[:, i + 1 :].addmm_(error_N1, factor_BB[i : i + 1, i + 1 :], alpha=-1)
        errors_NB[:, i : i + 1] = error_N1
    return errors_NB


def _partial_weights(w_NK: Tensor, mask_NK: Tensor, alpha: Tensor, step_N1: Tensor | None) -> PartialWeights:
    group_size = w_NK.shape[1] // alpha.shape[1]
    mean = ordinary_alpha(w_NK, mask_NK, group_size)
    factor = torch.where(mean > 0, alpha / mean, 1).repeat_interleave(group_size, dim=1)
    weight = torch.where(mask_NK, _rounded(w_NK, step_N1), w_NK * factor).float()
    codes = None if step_N1 is None else _codes(w_NK, step_N1).masked_fill(~mask_NK, 0).to(torch.int8)
    scale = None if step_N1 is None else step_N1.float()
    return PartialWeights(mask_NK, weight, ordinary_alpha(weight, mask_NK, group_size), codes, scale)


def _rounded(w: Tensor, step_N1: Tensor | None) -> Tensor:
    """What salient weights are stored as: multiples of their row's step, or (None) fp16 numbers."""
    return w.to(torch.float16).to(w.dtype) if step_N1 is None else _codes(w, step_N1) * step_N1


def _codes(w: Tensor, step_N1: Tensor) -> Tensor:
    # A row without salient weights has step 0 and its codes are never read; 1 only keeps NaN out.
    return (w / torch.where(step_N1 > 0, step_N1, 1)).round().clamp(-INT8_MAX, INT8_MAX)


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
