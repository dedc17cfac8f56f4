"""The packed binary Llama in plain torch, needing nothing but torch and transformers.

This file is copied into every packed release, so that `from_pretrained(folder, trust_remote_code=True)` works where
fbitrain is not installed; therefore it imports nothing of fbitrain. Where fbitrain is installed, `fbitrain.model.hf`
loads the same folders with its own kernels. The method is FBI-LLM's (arXiv 2407.07093).

N out_features, K in_features, Kw = ceil(K/32) words, G group size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

BLOCK_WEIGHTS = 2**22  # weights unpacked at one time: 16 MB in fp32, whatever the layer's size


class BinaryLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """A Llama's config with what is binary in it.

    binarize: `scale` (column, row, tensor or group), `beta` (whether there is a shift), `group_size` (for group) and
        `skip` (names of the Linears that stay in full precision).
    bits_per_weight: stored bits per binary weight, scales included; information only.
    """

    model_type = "fbitrain_llama"

    binarize: dict[str, Any] | None = None
    bits_per_weight: float | None = None


class PackedLinear(nn.Module):
    """y = x ŵᵀ with ŵ = α·sign + β, the signs stored as bits.

    Bit 1 means +1; element k of a row is bit k % 32 of little-endian word k // 32.
    Buffers: weight_bits int32 [N,Kw]; alpha and beta (or None) fp32, [1,K] (column), [N,1] (row), [1,1] (tensor),
    alpha [N,K/G] (group, without beta).
    """

    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor | None

    def __init__(self, in_features: int, out_features: int, scale: str, beta: bool, group_size: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group_size = group_size if scale == "group" else None
        shapes = {"column": (1, in_features), "row": (out_features, 1), "tensor": (1, 1)}
        shape = shapes[scale] if scale != "group" else (out_features, in_features // group_size)
        n_words = -(-in_features // 32)
        # dtypes are given because a model is built under the dtype it is loaded in, and bits and scales never change.
        self.register_buffer("weight_bits", torch.zeros(out_features, n_words, dtype=torch.int32))
        self.register_buffer("alpha", torch.zeros(shape, dtype=torch.float32))
        self.register_buffer("beta", torch.zeros(shape, dtype=torch.float32) if beta else None)

    def forward(self, x: Tensor) -> Tensor:
        """x [...,K] -> [...,N] in x's dtype."""
        rows = max(1, BLOCK_WEIGHTS // self.in_features)
        starts = range(0, self.out_features, rows)
        return torch.cat([F.linear(x, self._weight(start, start + rows).to(x.dtype)) for start in starts], dim=-1)

    def _weight(self, start: int, stop: int) -> Tensor:
        """ŵ of rows start to stop, [stop - start, K]."""
        signs = unpack_signs(self.weight_bits[start:stop], self.in_features)
        alpha = self._rows(self.alpha, start, stop)
        if self.group_size is not None:
            alpha = alpha.repeat_interleave(self.group_size, dim=1)
        weight = signs * alpha
        return weight if self.beta is None else weight + self._rows(self.beta, start, stop)

    @staticmethod
    def _rows(scale: Tensor, start: int, stop: int) -> Tensor:
        return scale if scale.shape[0] == 1 else scale[start:stop]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def unpack_signs(words: Tensor, k: int) -> Tensor:
    """int32 words [n,Kw] -> signs ±1 fp32 [n,k]."""
    byte = torch.arange(256, device=words.device).unsqueeze(1)
    signs_of_byte = ((byte >> torch.arange(8, device=words.device)) & 1).float() * 2 - 1  # [256,8]
    return F.embedding(words.contiguous().view(torch.uint8).int(), signs_of_byte).flatten(1)[:, :k]


class BinaryLlamaForCausalLM(LlamaForCausalLM):  # type: ignore[misc]
    """LlamaForCausalLM whose Linears, but for config.binarize["skip"], hold one bit per weight. For inference."""

    config_class = BinaryLlamaConfig

    def __init__(self, config: BinaryLlamaConfig) -> None:
        super().__init__(config)
        if not config.binarize:
            raise ValueError("config.json has no binarize section, so this is not a packed fbitrain model")
        skip = set(config.binarize["skip"])
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.Linear) and not {name, name.rpartition(".")[2]} & skip:
                self.set_submodule(name, self.packed_linear(module.in_features, module.out_features, config.binarize))

    @staticmethod
    def packed_linear(in_features: int, out_features: int, binarize: dict[str, Any]) -> nn.Module:
        """An empty packed layer for `in_features` and `out_features`; fbitrain puts its own in its place."""
        return PackedLinear(in_features, out_features, binarize["scale"], binarize["beta"], binarize["group_size"])

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but a tensor that is missing or unknown is a ValueError, never a random weight."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for problem in ("missing_keys", "unexpected_keys"):
            if names := sorted(info[problem]):
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise ValueError(f"the packed model's files do not fit its config.json: {problem} {shown}")
        return (model, info) if output_loading_info else model
