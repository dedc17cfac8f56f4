"""PartialBinaryLinear: a few salient weights in high precision, the ordinary rest in one bit (or up to four).

PB-LLM (arXiv 2310.00034) freezes the salient weights, int8 or fp16. CherryQ (arXiv 2404.02837) keeps them in fp16 and
trains them together with the ordinary ones.

Letters: N out_features, K in_features, G group size, Kw = ceil(K / 32) words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fbitrain.kernels import ops
from fbitrain.kernels.layout import NARROW_COLUMNS, scale_shape
from fbitrain.model.binarize import sign_ste, ste_gradient, wide, with_slope
from fbitrain.model.config import GRIDS, SALIENT_DTYPES, BinarizeConfig, method_settings
from fbitrain.model.packing import StoredLayer
from fbitrain.model.recomputed import Recipe, RecomputedLinear
from fbitrain.model.storage import salient_storage

INT8_MAX = 127  # symmetric: -128 is not used
# Distance between the levels of the uniform quantizer of 2^bits levels with the least mean squared error for normal
# weights (Max, "Quantizing for minimum distortion", 1960, table II), over their mean magnitude √(2/π)·σ. One bit gives
# the levels ±mean|w|, which are the best for any distribution.
STEP = {1: 2.0, 2: 1.2479, 3: 0.7344, 4: 0.4201}


class PartialBinaryLinear(RecomputedLinear):
    """y = x ŵᵀ + bias; ŵ is the salient weight where `mask` is True, elsewhere α·sign(weight).

    α is the mean |weight| over the ordinary weights of the row, or of the row's group. It follows the latent weights in
    each forward pass and is a constant in the gradient, as in PB-LLM's quantization-aware training: dW = α·STE(dŵ).

    Args, beyond those of LatentLinear:
        mask: bool [N, K], True for salient weights.
        salient_dtype: "int8" (symmetric, one scale per row) or "float16".
        trained: False freezes the salient weights at the values that `weight` has now; True trains them in `weight`,
            rounded to fp16 in forward with the gradient passed through, so that a release holds what was trained.
        bits: of the ordinary weights. 2 to 4 bits are uniform levels (i + 1/2)·step; their gradient is passed through,
            not multiplied by α.
        grid: what step is: "normal", mean |weight| over the row's (group's) ordinary weights times STEP, or "minmax",
            their max |weight| / 2^(bits-1).
        scale: "row" or "group" (of `group_size` columns).
        ste: straight-through estimator of the ordinary weights, "identity" or "clip".

    Buffers: salient_bits int32 [N, Kw], the packed mask; if frozen, salient_values int8 or fp16 [salient weights], row
    after row, and for int8 salient_scale fp32 [N, 1]. Values and scales keep their dtype when the module changes its.

    Raises:
        ValueError: an unknown scale, salient_dtype or number of bits; trained int8; a mask of another shape or dtype.
    """

    salient_bits: Tensor
    salient_values: Tensor | None
    salient_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        mask: Tensor,
        salient_dtype: str = "int8",
        trained: bool = False,
        bits: int = 1,
        grid: str = "normal",
        scale: str = "row",
        group_size: int = 128,
        ste: str = "identity",
        **latent: Any,
    ) -> None:
        _check(scale, salient_dtype, trained, bits, grid)
        if mask.dtype != torch.bool or mask.shape != (out_features, in_features):
            raise ValueError(f"mask must be bool [{out_features}, {in_features}], not {mask.dtype} {list(mask.shape)}")
        scale_shape(scale, out_features, in_features, group_size)  # refuses groups that do not divide K
        super().__init__(in_features, out_features, **latent)
        self.salient_dtype, self.trained, self.bits, self.grid, self.ste = salient_dtype, trained, bits, grid, ste
        self.scale, self.group_size = scale, group_size if scale == "group" else 0
        self.n_salient = int(mask.sum())
        mask = mask.to(self.weight.device)
        self.register_buffer("salient_bits", pack_mask(mask))
        self.register_buffer("salient_values", None)
        self.register_buffer("salient_scale", None)
        if not trained and salient_dtype == "int8":
            self.load_salient(*quantize_salient(self.weight, mask))
        elif not trained:
            self.salient_values = self.weight.detach()[mask].to(torch.float16)

    @classmethod
    def make(cls, binarize: BinarizeConfig, mask: Tensor | None, latent: dict[str, Any]) -> PartialBinaryLinear:
        """See LatentLinear."""
        assert mask is not None
        trained = binarize.traits.salient == "trained"
        salient: dict[str, Any] = {"mask": mask, "salient_dtype": binarize.salient.dtype, "trained": trained}
        return cls(**salient, **method_settings(binarize), **latent)

    @staticmethod
    def pack(binarize: BinarizeConfig, trained: Mapping[str, Tensor], dtype: torch.dtype) -> StoredLayer:
        """See LatentLinear."""
        weight, bits = trained["weight"], binarize.bits
        n, k = weight.shape
        mask = unpack_mask(trained["salient_bits"], k)
        group_size = binarize.group_size if binarize.scale == "group" else k
        # The levels of b bits, ±1/2, ±3/2, … steps, are the sums of b signs weighted 1/2, 1, 2, … steps.
        step = level_step(weight, mask, group_size, bits, binarize.grid)
        spread = step.where(step > 0, 1).repeat_interleave(group_size, dim=1)
        codes = (weight / spread).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).int() + 2 ** (bits - 1)
        planes = torch.stack([((codes >> plane) & 1) - 0.5 for plane in range(bits)])
        tensors = {"weight_bits": ops.pack_signs(planes), "alpha": (step / 2).to(dtype).float()}
        salient = binarize.salient.dtype
        if "salient_values" in trained:
            tensors["salient_values"] = trained["salient_values"]
            if salient == "int8":
                tensors["salient_scale"] = trained["salient_scale"].float()
        else:
            tensors["salient_values"] = weight[mask].to(torch.float16)
        n_salient = len(tensors["salient_values"])
        places = "csr" if "csr" in salient_storage(n, k, n_salient, salient, bits, 0) else "mask"
        tensors |= {"salient_mask": trained["salient_bits"]} if places == "mask" else _csr(mask)
        options = {"salient_dtype": salient, "scale": binarize.scale, "bits": bits}
        options |= {"group_size": binarize.group_size} if binarize.scale == "group" else {}
        return StoredLayer("partial", options, tensors, {"n_salient": n_salient, "places": places})

    @torch.no_grad()
    def load_salient(self, codes: Tensor, scale: Tensor) -> None:
        """Sets the frozen int8 values: codes int8 [N, K], read where the mask is True, times scale fp32 [N, 1].

        Raises ValueError for a layer whose salient weights are not int8.
        """
        if self.salient_dtype != "int8":
            raise ValueError(f"the salient weights are {self.salient_dtype}, which has no codes")
        self.salient_values = codes.to(self.salient_bits.device)[self.salient_mask()]
        self.salient_scale = scale.to(self.salient_bits.device, torch.float32, copy=True)

    def salient_mask(self) -> Tensor:
        """bool [N, K], True for salient weights."""
        return unpack_mask(self.salient_bits, self.in_features)

    def recipe(self) -> tuple[Recipe, tuple[Tensor | None, ...]]:
        """ŵ as a function of weight, mask, frozen values and their scale."""
        recipe = partial(partial_weight, bits=self.bits, grid=self.grid, group_size=self.group_size, ste=self.ste)
        return recipe, (self.weight, self.salient_bits, self.salient_values, self.salient_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PartialBinaryLinear:
        # DeepSpeed casts whole modules to bf16, which would round what is frozen to 8 bits.
        exact = {name: self._buffers[name] for name in ("salient_values", "salient_scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            self._buffers[name] = None if buffer is None or moved is None else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        kind = f"{self.salient_dtype} {'trained' if self.trained else 'frozen'}"
        return f"{super().extra_repr()}, n_salient={self.n_salient} {kind}, bits={self.bits}, scale={self.scale}"


def partial_weight(
    weight: Tensor,
    salient_bits: Tensor,
    values: Tensor | None,
    value_scale: Tensor | None,
    *,
    bits: int,
    group_size: int,
    ste: str,
    grid: str = "normal",
) -> Tensor:
    """ŵ [N, K] in the weight's dtype; see PartialBinaryLinear. `values` None trains the salient weights."""
    mask = unpack_mask(salient_bits, weight.shape[1])
    if values is None:
        salient = with_slope(weight.detach().to(torch.float16), weight)
    else:
        salient = weight.new_zeros(weight.shape).masked_scatter_(mask, values.to(weight.dtype))
        salient = salient if value_scale is None else (salient * value_scale).to(weight.dtype)
    return torch.where(mask, salient, _ordinary_weight(weight, mask, bits, group_size, ste, grid))


@torch.no_grad()
def ordinary_alpha(weight: Tensor, mask: Tensor, group_size: int = 0) -> Tensor:
    """Mean |w| over each row's own weights that are not salient, [N, 1], or each group's of G > 0 columns, [N, K/G].

    It is the α with the least ||w - α·sign(w)|| over them (PB-LLM); 0 where there are none. In fp32 or
    wider.
    """
    shape = (-1, group_size or weight.shape[1])
    magnitudes = weight.to(wide(weight.dtype)).abs().masked_fill(mask, 0)
    counts = torch.unflatten(~mask, 1, shape).sum(2)
    return torch.unflatten(magnitudes, 1, shape).sum(2) / counts.clamp(min=1)


@torch.no_grad()
def level_step(weight: Tensor, mask: Tensor, group_size: int, bits: int, grid: str) -> Tensor:
    """Distance between the levels of ordinary weights, in the shape of `ordinary_alpha`; see PartialBinaryLinear."""
    if grid == "normal":
        return ordinary_alpha(weight, mask, group_size) * STEP[bits]
    magnitudes = weight.to(wide(weight.dtype)).abs().masked_fill(mask, 0)
    largest: Tensor = torch.unflatten(magnitudes, 1, (-1, group_size or weight.shape[1])).amax(2)
    return largest / float(2 ** (bits - 1))


@torch.no_grad()
def quantize_salient(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [N, K], scale fp32 [N, 1]): salient weights to the nearest multiple of max |w| / 127 of their row.

    The grid is symmetric, so no weight changes its sign. Codes are 0 off the mask, scales 0 in rows without salient
    weights.
    """
    salient = weight.to(wide(weight.dtype)).masked_fill(~mask, 0)
    scale = salient.abs().amax(1, keepdim=True) / INT8_MAX
    codes = (salient / scale.where(scale > 0, 1)).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale.float()


def pack_mask(mask: Tensor) -> Tensor:
    """bool [N, K] -> int32 [N, Kw], bit 1 for True (layout of kernels/layout.py)."""
    return ops.pack_signs(torch.where(mask, 1.0, -1.0))


def unpack_mask(salient_bits: Tensor, k: int) -> Tensor:
    """int32 [N, Kw] -> bool [N, k]."""
    return ops.unpack_signs(salient_bits, k, torch.bfloat16) > 0


def _ordinary_weight(weight: Tensor, mask: Tensor, bits: int, group_size: int, ste: str, grid: str) -> Tensor:
    step = level_step(weight, mask, group_size, bits, grid)
    step = step.repeat_interleave(group_size, dim=1) if group_size else step
    if bits == 1:
        return (step / 2 * sign_ste(weight, ste)).to(weight.dtype)
    values, half = weight.detach(), 2 ** (bits - 1)
    level = (values / step.where(step > 0, 1)).floor().clamp(-half, half - 1)
    return with_slope((level + 0.5) * step, weight, lambda: ste_gradient(torch.ones_like(values), values, ste))


def _csr(mask: Tensor) -> dict[str, Tensor]:
    rows, columns = mask.nonzero(as_tuple=True)
    starts = torch.bincount(rows, minlength=len(mask)).cumsum(0)
    narrow = torch.uint16 if mask.shape[1] <= NARROW_COLUMNS else torch.int32
    return {"salient_columns": columns.to(narrow), "salient_rows": torch.cat([starts.new_zeros(1), starts]).int()}


def _check(scale: str, salient_dtype: str, trained: bool, bits: int, grid: str) -> None:
    if scale not in ("row", "group"):
        raise ValueError(f"scale={scale!r} is no pattern of a partially binary layer; choose row or group")
    if salient_dtype not in SALIENT_DTYPES:
        raise ValueError(f"salient_dtype={salient_dtype!r} is unknown; choose {' or '.join(SALIENT_DTYPES)}")
    if trained and salient_dtype == "int8":
        raise ValueError("int8 salient weights cannot be trained; choose float16")
    if bits not in STEP:
        raise ValueError(f"bits={bits} must be from 1 to {max(STEP)}")
    if grid not in GRIDS:
        raise ValueError(f"grid={grid!r} is unknown; choose {' or '.join(GRIDS)}")
