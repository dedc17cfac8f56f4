"""Which weights of a layer stay in high precision: scores, and the mask of the highest.

Magnitude and Hessian are PB-LLM's criteria (arXiv 2310.00034, section 3.3). CherryQ's impact (arXiv 2404.02837) is the
squared gradient itself, the diagonal of the Fisher information, and needs no function here.
Letters: N out_features, K in_features, G group size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fbitrain.model.config import SCOPES
from fbitrain.model.hessian import inverse_diagonal, inverse_factor


def magnitude_scores(w_NK: Tensor) -> Tensor:
    """|w|, [N, K] in fp32."""
    return w_NK.detach().abs().float()


def hessian_scores(w_NK: Tensor, hessian_KK: Tensor, damping: float, score: str) -> Tensor:
    """|w| / d_k, [N, K]: large where the input counts and no other one can make up for it.

    score: "hessian_diagonal", d = diag H⁻¹, or "hessian_cholesky", d = diag U for the upper Cholesky factor U of H⁻¹:
    U_kk² is entry k of the inverse Hessian of column k and those after it, which are all that GPTQ's solver still
    changes when it reaches column k. The square of the score is the w² / [H⁻¹]_kk² of PB-LLM's paper read as it is
    written, and as its published code computes it. It orders alike, without the overflow of a fourth power.
    H is damped as in `inverse_factor`, so a dead input's d is the largest there is. Raises SingularHessianError.
    """
    factor_KK = inverse_factor(hessian_KK, damping)
    d_K = factor_KK.diagonal() if score == "hessian_cholesky" else inverse_diagonal(factor_KK)
    return magnitude_scores(w_NK) / d_K.float()


def select_mask(scores_NK: Tensor, fraction: float, scope: str = "layer", group_size: int = 128) -> Tensor:
    """bool [N, K], True at the highest scores; among equal ones those with the lower index in row-major order win.

    Exactly round(fraction · count) are chosen: of the whole layer (scope "layer"), each row ("row"), or of each block
    of `group_size` columns ("group"; the last block has what is left). Raises ValueError for a fraction outside (0, 1),
    an unknown scope, a group_size below 1, and scores that are NaN.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1, both excluded")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; choose {', '.join(SCOPES)}")
    if scope == "group" and group_size < 1:
        raise ValueError(f"group_size={group_size} must be at least 1")
    if bool(scores_NK.isnan().any()):
        raise ValueError("the scores hold NaN")
    if scope == "row":
        ranked = scores_NK.argsort(dim=1, descending=True, stable=True)
        chosen = ranked[:, : round(fraction * scores_NK.shape[1])]
        return torch.zeros_like(scores_NK, dtype=torch.bool).scatter_(1, chosen, True)
    width = scores_NK.shape[1] if scope == "layer" else group_size
    blocks = [_highest(block, round(fraction * block.numel())) for block in torch.split(scores_NK, width, dim=1)]
    return torch.cat(blocks, dim=1)


def _highest(scores: Tensor, count: int) -> Tensor:
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(scores.shape)
