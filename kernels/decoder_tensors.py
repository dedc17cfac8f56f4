"""The sizes and the tensors of a compiled decoder, and the check that the tensors have these sizes.

Letters as in fbitrain.kernels.decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fbitrain.kernels.layout import MAX_K, n_words, scale_shape

FORMAT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/dense_math.h
MAX_HEAD_SIZE = 1024  # as in csrc/decoder.h
LINEARS = ("query", "key", "value", "output", "gate", "up", "down")  # of a layer
_SIZES = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_size", "vocab_size")


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the decoder, and the pattern of its scales."""

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    vocab_size: int
    norm_eps: float
    scale: str
    group_size: int = 128  # of scale="group"

    def linear(self, name: str) -> tuple[int, int]:
        """N and K of a layer's Linear."""
        width, kv_width = self.n_heads * self.head_size, self.n_kv_heads * self.head_size
        inputs = {"query": width, "key": kv_width, "value": kv_width, "gate": self.d_ff, "up": self.d_ff}
        if name in inputs:
            return inputs[name], self.d_model
        return self.d_model, {"output": width, "down": self.d_ff}[name]


class BinaryTensors(NamedTuple):
    """One binary Linear: words int32 [N,Kw], alpha and beta (None: no shift) fp32 in the shape of the scale pattern."""

    words: Tensor
    alpha: Tensor
    beta: Tensor | None


class LayerTensors(NamedTuple):
    """One layer; norms [D]."""

    query: BinaryTensors
    key: BinaryTensors
    value: BinaryTensors
    output: BinaryTensors
    gate: BinaryTensors
    up: BinaryTensors
    down: BinaryTensors
    attention_norm: Tensor
    mlp_norm: Tensor


class DecoderTensors(NamedTuple):
    """embedding and head [V,D] in one dtype of float32, bfloat16 and float16 (the head may be the embedding itself);
    frequencies [head_size / 2]: radians per position of the rotary embedding."""

    layers: list[LayerTensors]
    embedding: Tensor
    head: Tensor
    final_norm: Tensor
    frequencies: Tensor


def check_shape(shape: DecoderShape) -> None:
    """Raises ValueError for sizes that no decoder has."""
    for name in _SIZES:
        if not 1 <= getattr(shape, name) <= MAX_K:
            raise ValueError(f"{name}={getattr(shape, name)} is no size; it goes from 1 to {MAX_K}")
    if shape.head_size % 2 or shape.head_size > MAX_HEAD_SIZE:
        raise ValueError(f"head_size={shape.head_size} must be even, and {MAX_HEAD_SIZE} at most")
    if shape.n_heads % shape.n_kv_heads:
        raise ValueError(f"n_heads={shape.n_heads} is not a multiple of n_kv_heads={shape.n_kv_heads}")


def check_tensors(shape: DecoderShape, tensors: DecoderTensors) -> None:
    """Raises ValueError with the name of the first tensor that does not fit `shape`."""
    d_model = shape.d_model
    if len(tensors.layers) != shape.n_layers:
        raise ValueError(f"there are {len(tensors.layers)} layers; they must be {shape.n_layers}")
    for number, layer in enumerate(tensors.layers):
        for name in LINEARS:
            n, k = shape.linear(name)
            words, alpha, beta = getattr(layer, name)
            where, scales = f"layer {number}, {name}", scale_shape(shape.scale, n, k, shape.group_size)
            _require(words, f"{where} words", (n, n_words(k)), (torch.int32,))
            _require(alpha, f"{where} alpha", scales, (torch.float32,))
            if beta is not None and shape.scale == "group":
                raise ValueError(f"{where} has a shift, which scale=group does not; beta must be None")
            if beta is not None:
                _require(beta, f"{where} beta", scales, (torch.float32,))
        for name in ("attention_norm", "mlp_norm"):
            _require(getattr(layer, name), f"layer {number}, {name}", (d_model,), tuple(FORMAT))
    _require(tensors.embedding, "embedding", (shape.vocab_size, d_model), tuple(FORMAT))
    _require(tensors.head, "head", (shape.vocab_size, d_model), (tensors.embedding.dtype,))
    _require(tensors.final_norm, "final_norm", (d_model,), tuple(FORMAT))
    _require(tensors.frequencies, "frequencies", (shape.head_size // 2,), tuple(FORMAT))


def _require(tensor: Tensor, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or not tensor.is_cpu:
        raise ValueError(
            f"{name} is {describe(tensor)}; "
            f"it must be {' or '.join(map(str, dtypes))} {list(shape)}, contiguous, on cpu"
        )


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
