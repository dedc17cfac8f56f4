"""The layers of packed models in plain torch: weights are unpacked from their bits, a few rows at a time.

Copied into packed releases beside remote_code.py, so nothing of fbitrain is imported here. fbitrain.model.packed_layers
has the same layers on fbitrain's kernels.

Bit 1 means +1; element k of a row is bit k % 32 of little-endian int32 word k // 32.
N out_features, K in_features, Kw = ceil(K/32) words, G group size, E experts, P sign planes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK_WEIGHTS = 2**22  # weights unpacked at one time: 16 MB in fp32, whatever the layer's size
NARROW_COLUMNS = 2**16  # rows of up to this many weights have their column numbers in 16 bits


class PackedWeight(nn.Module):
    """A Linear for inference whose weight ŵ [N, K] is unpacked a few rows at a time.

    What is trained in full precision is kept in fp32 buffers of their own dtype: `bias` [N] (or None), and scales. All
    start as zeros, to be loaded. Under `int8`, each token of x is rounded to 255 levels first, as in training.
    """

    bias: Tensor | None
    int8: bool = False

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.hold("bias", (out_features,) if bias else None)

    def hold(self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype = torch.float32) -> None:
        """Registers a buffer. Its dtype is given: a model is built under the dtype it is loaded in, bits and scales
        never change theirs."""
        self.register_buffer(name, None if shape is None else torch.zeros(shape, dtype=dtype))

    def hold_bits(self, name: str, *planes: int) -> None:
        """Registers a buffer for the bits of `planes` matrices [N, K]."""
        self.hold(name, (*planes, self.out_features, -(-self.in_features // 32)), torch.int32)

    def check(self) -> None:
        """Raises ValueError if what was loaded is damaged: a layer must not compute with it, nor index by it."""
        for name, buffer in self.named_buffers(recurse=False):
            # The extremes of a tensor with a NaN are NaN.
            if buffer.is_floating_point() and len(buffer) and not torch.stack(torch.aminmax(buffer)).isfinite().all():
                raise ValueError(f"{name} is not finite")

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        y = self.product(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x ŵᵀ."""
        values, step = quantize_tokens(x) if self.int8 else (x, None)
        y = torch.cat([F.linear(values, block.to(x.dtype)) for block in self.blocks()], dim=-1)
        return y if step is None else y * step.to(y.dtype)

    def weight(self) -> Tensor:
        """ŵ [N, K] in fp32."""
        return torch.cat(list(self.blocks()))

    def blocks(self) -> Iterator[Tensor]:
        """ŵ in fp32, from the first row to the last, [n, K] at a time."""
        raise NotImplementedError

    def row_blocks(self) -> Iterator[slice]:
        """The rows of each of `blocks`."""
        n = max(1, BLOCK_WEIGHTS // self.in_features)
        for start in range(0, self.out_features, n):
            yield slice(start, min(start + n, self.out_features))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class PackedLinear(PackedWeight):
    """ŵ = α·sign + β.

    Buffers: weight_bits int32 [N, Kw]; alpha and beta (or None) fp32, [1, K] (scale "column"), [N, 1] ("row"),
    [1, 1] ("tensor"), alpha [N, K/G] ("group", without beta).
    """

    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: str = "column",
        beta: bool = True,
        group_size: int = 128,
        int8: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.scale, self.group_size, self.int8 = scale, group_size, int8
        shapes = {"column": (1, in_features), "row": (out_features, 1), "tensor": (1, 1)}
        shape = shapes[scale] if scale != "group" else (out_features, in_features // group_size)
        self.hold_bits("weight_bits")
        self.hold("alpha", shape)
        self.hold("beta", shape if beta else None)

    def blocks(self) -> Iterator[Tensor]:
        for rows in self.row_blocks():
            weight = unpack_signs(self.weight_bits[rows], self.in_features) * self._scales(self.alpha, rows)
            yield weight if self.beta is None else weight + self._scales(self.beta, rows)

    def _scales(self, scales: Tensor, rows: slice) -> Tensor:
        scales = scales if scales.shape[0] == 1 else scales[rows]
        return scales.repeat_interleave(self.group_size, dim=1) if self.scale == "group" else scales

    def extra_repr(self) -> str:
        group = f", group_size={self.group_size}" if self.scale == "group" else ""
        int8 = ", int8 activations" if self.int8 else ""
        return f"{super().extra_repr()}, scale={self.scale}{group}, beta={self.beta is not None}{int8}"


class PackedTernaryLinear(PackedWeight):
    """ŵ = α·t with t in -1, 0, +1: the mean of two signs.

    Buffers: weight_bits int32 [2, N, Kw]; alpha fp32 [1, 1].
    """

    weight_bits: Tensor
    alpha: Tensor
    int8 = True

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.hold_bits("weight_bits", 2)
        self.hold("alpha", (1, 1))

    def blocks(self) -> Iterator[Tensor]:
        for rows in self.row_blocks():
            first, second = (unpack_signs(plane[rows], self.in_features) for plane in self.weight_bits)
            yield (first + second) / 2 * self.alpha


class PackedPartialLinear(PackedWeight):
    """ŵ is a salient weight in a few places, elsewhere α·Σ_p 2^p·sign_p: one sign, or up to four for 16 levels.

    Buffers: weight_bits int32 [P, N, Kw], whose bits at salient places mean nothing; alpha fp32 [N, 1] or [N, K/G];
    salient_values int8 or float16 [n_salient], row after row, for int8 with salient_scale fp32 [N, 1]; their places,
    either salient_mask int32 [N, Kw], or, if that takes fewer bits ("csr"), salient_columns (uint16, int32 beyond
    65536 columns) [n_salient] and salient_rows int32 [N + 1], where in them each row begins.
    """

    weight_bits: Tensor
    alpha: Tensor
    salient_values: Tensor
    salient_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        n_salient: int,
        places: str,
        salient_dtype: str,
        scale: str = "row",
        group_size: int = 128,
        bits: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.scale, self.group_size = scale, group_size if scale == "group" else in_features
        self.places = places
        self.hold_bits("weight_bits", bits)
        self.hold("alpha", (out_features, in_features // self.group_size))
        self.hold("salient_values", (n_salient,), getattr(torch, salient_dtype))
        self.hold("salient_scale", (out_features, 1) if salient_dtype == "int8" else None)
        if places == "mask":
            self.hold_bits("salient_mask")
        else:
            self.hold("salient_columns", (n_salient,), torch.uint16 if in_features <= NARROW_COLUMNS else torch.int32)
            self.hold("salient_rows", (out_features + 1,), torch.int32)

    def check(self) -> None:
        """As above; places must lie inside of the matrix, row after row, one for each salient value."""
        super().check()
        count = len(self.salient_values)
        if self.places == "mask":
            marked = sum(int(self.mask(rows).sum()) for rows in self.row_blocks())
            if marked != count:
                raise ValueError(f"salient_mask marks {marked} weights, but there are {count} values")
            return
        starts, columns = self.get_buffer("salient_rows").long(), self.get_buffer("salient_columns").int()
        if int(starts[0]) != 0 or int(starts[-1]) != count or bool((starts.diff() < 0).any()):
            raise ValueError(f"salient_rows does not divide the {count} salient values among the rows")
        if count and not 0 <= int(columns.min()) <= int(columns.max()) < self.in_features:
            raise ValueError(f"salient_columns names columns beyond the {self.in_features} of the weight")
        ascending = columns.diff() > 0
        ascending[starts[(starts > 0) & (starts < count)] - 1] = True  # where the next row begins
        if not bool(ascending.all()):
            raise ValueError("salient_columns is not in ascending order within each row")

    def blocks(self) -> Iterator[Tensor]:
        start = 0
        for rows in self.row_blocks():
            mask = self.mask(rows)
            stop = start + int(mask.sum())
            salient = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
            salient[mask] = self.salient_values[start:stop].float()
            salient = salient if self.salient_scale is None else salient * self.salient_scale[rows]
            signs = (unpack_signs(plane[rows], self.in_features) * 2**p for p, plane in enumerate(self.weight_bits))
            alpha = self.alpha[rows].repeat_interleave(self.group_size, dim=1)
            yield torch.where(mask, salient, alpha * sum(signs))
            start = stop

    def mask(self, rows: slice) -> Tensor:
        """bool [n, K], True at the salient places of `rows`."""
        if self.places == "mask":
            return unpack_signs(self.get_buffer("salient_mask")[rows], self.in_features) > 0
        starts = self.get_buffer("salient_rows")[rows.start : rows.stop + 1]
        columns = self.get_buffer("salient_columns")[int(starts[0]) : int(starts[-1])].long()
        mask = torch.zeros(len(starts) - 1, self.in_features, dtype=torch.bool, device=starts.device)
        mask[torch.repeat_interleave(starts.diff()), columns] = True
        return mask

    def extra_repr(self) -> str:
        salient = f"{len(self.salient_values)} salient {str(self.salient_values.dtype).removeprefix('torch.')}"
        return f"{super().extra_repr()}, bits={len(self.weight_bits)}, scale={self.scale}, {salient} ({self.places})"


class PackedOneBitLinear(PackedWeight):
    """ŵ = scale_outᵀ·sign·scale_in; under `output_norm` a LayerNorm without weights stands behind the product.

    Buffers: weight_bits int32 [N, Kw]; scale_in fp32 [1, K]; scale_out fp32 [1, N].
    """

    weight_bits: Tensor
    scale_in: Tensor
    scale_out: Tensor

    def __init__(self, in_features: int, out_features: int, *, output_norm: bool = False, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.output_norm = output_norm
        self.hold_bits("weight_bits")
        self.hold("scale_in", (1, in_features))
        self.hold("scale_out", (1, out_features))

    def product(self, x: Tensor) -> Tensor:
        return self.normed(super().product(x))

    def normed(self, y: Tensor) -> Tensor:
        return F.layer_norm(y, (self.out_features,)) if self.output_norm else y

    def blocks(self) -> Iterator[Tensor]:
        for rows in self.row_blocks():
            yield unpack_signs(self.weight_bits[rows], self.in_features) * self.scale_in * self.scale_out[:, rows].T


class PackedMixtureLinear(PackedWeight):
    """y = ((x·(g scale_in)) Sᵀ)·(g scale_out), g = softmax(x routerᵀ): scales that depend on the token.

    `blocks` and `weight` are the signs S; there is no ŵ that serves all tokens.
    Buffers: weight_bits int32 [N, Kw]; scale_in [E, K], scale_out [E, N] and router [E, K] in fp32.
    """

    weight_bits: Tensor
    scale_in: Tensor
    scale_out: Tensor
    router: Tensor

    def __init__(self, in_features: int, out_features: int, *, n_experts: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.hold_bits("weight_bits")
        self.hold("scale_in", (n_experts, in_features))
        self.hold("scale_out", (n_experts, out_features))
        self.hold("router", (n_experts, in_features))

    def product(self, x: Tensor) -> Tensor:
        gates = self.gates(x)
        scale_in, scale_out = ((gates @ scale).to(x.dtype) for scale in (self.scale_in, self.scale_out))
        return super().product(x * scale_in) * scale_out

    def gates(self, x: Tensor) -> Tensor:
        """x [..., K] -> the experts' shares [..., E] in fp32."""
        return torch.softmax(F.linear(x, self.router.to(x.dtype)), dim=-1, dtype=torch.float32)

    def blocks(self) -> Iterator[Tensor]:
        for rows in self.row_blocks():
            yield unpack_signs(self.weight_bits[rows], self.in_features)


def unpack_signs(words: Tensor, k: int) -> Tensor:
    """int32 words [n, Kw] -> signs ±1 fp32 [n, k]."""
    byte = torch.arange(256, device=words.device).unsqueeze(1)
    signs_of_byte = ((byte >> torch.arange(8, device=words.device)) & 1).float() * 2 - 1  # [256,8]
    return F.embedding(words.contiguous().view(torch.uint8).int(), signs_of_byte).flatten(1)[:, :k]


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [..., K] in x's dtype, step fp32 [..., 1]) with x ≈ codes·step: each token in steps of max |x| / 127."""
    step = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() * torch.where(step > 0, 1 / step, 0)).round().to(x.dtype), step
