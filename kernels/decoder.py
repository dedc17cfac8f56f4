"""A whole Llama decoder with binary Linears in one call of compiled code: tokens to hidden states, those to logits.

It computes what transformers' Llama computes in fp32 from the same tensors, whose weights it reads where they lie, so
they may be memory-mapped files. No torch op runs per layer. See csrc/decoder.cpp and docs/kernels.md, Whole models.

Letters: M tokens, D d_model, F d_ff, V vocabulary, N and K out_features and in_features, Kw = ceil(K / 32) words.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from fbitrain.kernels import cpu
from fbitrain.kernels.decoder_tensors import (
    FORMAT,
    LINEARS,
    DecoderShape,
    DecoderTensors,
    check_shape,
    check_tensors,
    describe,
)
from fbitrain.kernels.dispatch import Call, select_backend
from fbitrain.kernels.layout import MODES, SCALES

_WIDTH = 32  # kWidth of csrc/dense_math.h: positions per block of the cache
# The cache is as exact as the products around it: fp16 rounds to 2^-11, int8 activations to 2^-8.
_CACHE_DTYPE = {"float": torch.float32, "int8": torch.float16}
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class NotFiniteError(ValueError):
    """int8 activations were asked for, and some are NaN or infinite."""


class _BinaryWeight(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("words", "alpha", "beta", "interleaved")]


class _LayerWeights(ctypes.Structure):
    _fields_ = [
        *((name, _BinaryWeight) for name in LINEARS),
        ("attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
    ]


_SIZES = ("n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads", "head_size", "vocab_size", "group_size")


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_LayerWeights)),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "final_norm", "frequencies")),
        *((name, ctypes.c_int64) for name in _SIZES),
        *(("scale", ctypes.c_int32), ("format", ctypes.c_int32), ("epsilon", ctypes.c_float)),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        *(("keys", ctypes.c_void_p), ("values", ctypes.c_void_p)),
        *(("capacity", ctypes.c_int64), ("format", ctypes.c_int32)),
    ]


class _Layout(NamedTuple):
    """What a cache's memory looks like, but for how many positions there are."""

    n_layers: int
    n_kv_heads: int
    head_size: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.n_layers} layers of {self.n_kv_heads} heads of {self.head_size} in {self.dtype}"


class Cache:
    """Keys and values of the tokens so far, room for `capacity` of them. Memory is taken as positions are filled."""

    def __init__(self, layout: _Layout, capacity: int) -> None:
        self.capacity, self.length = capacity, 0
        self.layout = layout
        padded = _round_up(capacity, _WIDTH)
        positions = layout.n_layers * layout.n_kv_heads * padded
        # empty, not zeros: pages that nobody writes are never backed by memory.
        self._keys = torch.empty(positions * layout.head_size, dtype=layout.dtype, device="cpu")
        padded_head = _round_up(layout.head_size, _WIDTH)
        self._values = torch.empty(positions * padded_head, dtype=layout.dtype, device="cpu")
        self.described = _Cache(self._keys.data_ptr(), self._values.data_ptr(), padded, FORMAT[layout.dtype])


class _Screen(NamedTuple):
    """A second, coarse copy of the head, and the bounds of what it leaves out."""

    codes: Tensor
    bounds: Tensor

    def pointers(self) -> tuple[int, int]:
        return self.codes.data_ptr(), self.bounds.data_ptr()


class Decoder:
    """A decoder made of `tensors`. `activations`: "float", or "int8" per token at every binary Linear.

    Besides the tensors it holds two copies: of the bits, in the order in which single tokens are multiplied fastest, if
    the level has such an order; and of the head, in 6 bits a weight, from the first call of `likeliest` on.

    It uses the level that FBITRAIN_BACKEND or the machine gives `binary_linear`, and torch.get_num_threads() threads.
    Raises ValueError for a shape that no decoder has, for tensors that do not fit it, and where no compiled level runs
    (`compiled_level`).
    """

    def __init__(self, shape: DecoderShape, tensors: DecoderTensors, activations: str = "float") -> None:
        if activations not in MODES:
            raise ValueError(f"activations={activations!r} is unknown; choose {' or '.join(MODES)}")
        level = compiled_level(shape.scale, shape.group_size)
        if not level:
            raise ValueError(f"no compiled kernel runs scale={shape.scale} with group_size={shape.group_size} here")
        check_shape(shape)
        check_tensors(shape, tensors)
        self.shape, self._mode, self._level = shape, MODES.index(activations), level
        self._layout = _Layout(shape.n_layers, shape.n_kv_heads, shape.head_size, _CACHE_DTYPE[activations])
        self._kept: list[Tensor] = []  # everything that the description below points to
        self._described = self._describe(tensors)
        self._screen: _Screen | None = None  # made by the first call of `likeliest`
        self._screen_bytes = cpu.screen_bytes(shape.d_model)

    def new_cache(self, capacity: int) -> Cache:
        """An empty cache for `capacity` tokens, fp32 for float activations and fp16 for int8."""
        return Cache(self._layout, capacity)

    def hidden(self, ids: Tensor, cache: Cache, last: int | None = None) -> Tensor:
        """ids int [M], the tokens after those in `cache`, which it adds -> what the head is given, fp32 [M,D].

        With `last`, only of that many tokens at the end, [last,D]: the last layer then computes no more of the others
        than keys and values. The result for a token does not depend on how a text is cut into calls. Raises ValueError
        for ids that are not in the vocabulary, too many tokens for the cache and the cache of another decoder;
        NotFiniteError with int8 activations.
        """
        self._check_tokens(ids, cache)
        wanted = ids.numel() if last is None else min(last, ids.numel())
        ids = ids.to(torch.int32).resolve_neg().contiguous()
        hidden = torch.empty((wanted, self.shape.d_model), dtype=torch.float32, device="cpu")
        described = ctypes.addressof(self._described), ctypes.addressof(cache.described)
        sizes = cache.length, ids.numel(), wanted
        arguments = self._mode, *described, ids.data_ptr(), *sizes, hidden.data_ptr()
        status = cpu.status_of("decoder_hidden", self._level, *arguments)
        if status > 0:
            position = cache.length + status - 1
            raise NotFiniteError(f"int8 activations must be finite, and those of position {position} are not")
        cpu.require_ok(status, "decoder_hidden")
        cache.length += ids.numel()
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden fp32 [M,D] -> logits fp32 [M,V]."""
        self._check_hidden(hidden)
        hidden = hidden.resolve_neg().contiguous()
        logits = torch.empty((len(hidden), self.shape.vocab_size), dtype=torch.float32, device="cpu")
        self._call("decoder_logits", hidden.data_ptr(), len(hidden), logits.data_ptr())
        return logits

    def likeliest(self, hidden: Tensor) -> int:
        """hidden fp32 [1,D] -> the first token with the largest logit, as `logits(hidden).argmax()` gives it.

        It reads less than half as much: the first call makes a copy of the head in 6 bits a weight, whose bounds leave
        few rows that have to be read (csrc/head_screen.cpp).
        """
        if len(hidden) != 1:
            raise ValueError(f"hidden is {describe(hidden)}; it must be torch.float32 [1, {self.shape.d_model}] on cpu")
        self._check_hidden(hidden)
        if not self._screen_bytes:
            return int(self.logits(hidden).argmax())
        if self._screen is None:
            self._screen = self._make_screen()
        token = ctypes.c_int64()
        hidden = hidden.resolve_neg().contiguous()
        self._call("decoder_likeliest", *self._screen.pointers(), hidden.data_ptr(), ctypes.addressof(token))
        return token.value

    def _make_screen(self) -> _Screen:
        rows = self.shape.vocab_size
        screen = _Screen(
            codes=torch.empty((rows, self._screen_bytes), dtype=torch.uint8, device="cpu"),
            bounds=torch.empty((3, rows), dtype=torch.float32, device="cpu"),
        )
        self._call("screen_head", *screen.pointers())
        return screen

    def _call(self, op: str, *pointers: int) -> None:
        """Calls the C function of `op` with the description of this decoder and `pointers`."""
        cpu.call(op, self._level, ctypes.addressof(self._described), *pointers)

    def _check_hidden(self, hidden: Tensor) -> None:
        d_model = self.shape.d_model
        if hidden.dtype is not torch.float32 or hidden.shape[1:] != (d_model,) or not hidden.is_cpu:
            raise ValueError(f"hidden is {describe(hidden)}; it must be torch.float32 [M, {d_model}] on cpu")

    def _check_tokens(self, ids: Tensor, cache: Cache) -> None:
        if cache.layout != self._layout:
            raise ValueError(
                f"the cache is for {cache.layout}, not {self._layout}; make it with this decoder's new_cache"
            )
        if ids.ndim != 1 or ids.dtype not in _INTEGERS or not ids.is_cpu:
            raise ValueError(f"ids are {describe(ids)}; they must be integers [M] on cpu")
        if ids.numel() > cache.capacity - cache.length:
            raise ValueError(
                f"{ids.numel()} tokens do not fit a cache of {cache.capacity} that holds {cache.length} already"
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.shape.vocab_size:
            raise ValueError(
                f"token ids from {int(ids.min())} to {int(ids.max())} do not fit "
                f"a vocabulary of {self.shape.vocab_size}"
            )

    def _describe(self, tensors: DecoderTensors) -> _Model:
        layers = (_LayerWeights * self.shape.n_layers)()
        for described, layer in zip(layers, tensors.layers, strict=True):
            for name in LINEARS:
                words, alpha, beta = getattr(layer, name)
                _, k = self.shape.linear(name)
                interleaved = cpu.interleave(self._level, words, k)
                pointers = (None if each is None else self._pointer(each) for each in (words, alpha, beta, interleaved))
                setattr(described, name, _BinaryWeight(*pointers))
            described.attention_norm = self._pointer(layer.attention_norm.float())
            described.mlp_norm = self._pointer(layer.mlp_norm.float())
        model = _Model(
            layers=layers,
            embedding=self._pointer(tensors.embedding),
            head=self._pointer(tensors.head),
            final_norm=self._pointer(tensors.final_norm.float()),
            frequencies=self._pointer(tensors.frequencies.float()),
            scale=SCALES.index(self.shape.scale),
            format=FORMAT[tensors.embedding.dtype],
            epsilon=self.shape.norm_eps,
        )
        for name in _SIZES:
            setattr(model, name, getattr(self.shape, name))
        return model

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()


def compiled_level(scale: str, group_size: int) -> str:
    """The level that runs such Linears in a decoder here, "" where only the reference does. Builds the library."""
    call = Call("binary_linear", "cpu", torch.float32, group_size if scale == "group" else 0)
    backend = select_backend(call).backend
    return backend if backend in cpu.LEVELS else ""


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
