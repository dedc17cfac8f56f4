"""The CPU kernels of kernels/csrc as functions of tensors, called through ctypes.

A level is an instruction set together with all below it: "amx" runs the AMX tiles where they pay and AVX-512 elsewhere.
The functions take what `ops` has checked; see fbitrain.kernels.reference for what they compute.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from fbitrain.kernels.checks import not_finite
from fbitrain.kernels.cpu_build import BuildError, build
from fbitrain.kernels.layout import MODES, SCALES, interleaved_words, n_words
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight

LEVELS = ("amx", "avx512", "avx2", "portable")  # fastest first
_NUMBER = {"portable": 0, "avx2": 1, "avx512": 2, "amx": 3}  # as in csrc/cpu_features.cpp
_NEEDED = {"amx": "AMX-INT8", "avx512": "AVX-512 VNNI and VPOPCNTDQ, and GFNI", "avx2": "AVX2", "portable": "anything"}
_FORMAT = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}  # as in csrc/pack.inl
DTYPES = {
    "pack_signs": tuple(_FORMAT),
    "unpack_signs": tuple(_FORMAT),
    "binary_linear": (torch.float32, torch.bfloat16),
    "mixture_linear": (torch.float32, torch.bfloat16),
    "partial_linear": (torch.float32, torch.bfloat16),
}

_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_ARGUMENTS = {
    "binary_linear": [_INT] * 5 + [_POINTER] * 6 + [_SIZE] * 4,
    "mixture_linear": [_INT] * 4 + [_POINTER] * 6 + [_SIZE] * 4,
    "partial_linear": [_INT] * 5 + [_POINTER] * 8 + [_SIZE] * 5,
    "xnor_gemm": [_INT] * 2 + [_POINTER] * 3 + [_SIZE] * 3,
    "pack_signs": [_INT] * 3 + [_POINTER] * 2 + [_SIZE] * 2,
    "unpack_signs": [_INT] * 3 + [_POINTER] * 2 + [_SIZE] * 2,
    "transpose_signs": [_INT] + [_POINTER] * 2 + [_SIZE] * 2,
    "interleaved_bytes": [_INT] + [_SIZE] * 2,
    "interleave": [_INT] * 2 + [_POINTER] * 2 + [_SIZE] * 2,
    "decoder_hidden": [_INT] * 3 + [_POINTER] * 3 + [_SIZE] * 3 + [_POINTER],
    "decoder_logits": [_INT] * 2 + [_POINTER] * 2 + [_SIZE] + [_POINTER],
    "screen_bytes": [_SIZE],
    "screen_head": [_INT] * 2 + [_POINTER] * 3,
    "decoder_likeliest": [_INT] * 2 + [_POINTER] * 5,
}


class Library:
    """The C functions of a compiled library. Raises BuildError if it cannot be loaded."""

    def __init__(self, path: Path) -> None:
        try:
            self._loaded = ctypes.CDLL(str(path))
        except OSError as error:
            raise BuildError(f"{path} cannot be loaded ({error}); delete it") from error
        for name, arguments in _ARGUMENTS.items():
            function = getattr(self._loaded, f"fbitrain_{name}")
            function.argtypes, function.restype = arguments, ctypes.c_int64

    def call(self, name: str, *arguments: int | None) -> int:
        """What the C function fbitrain_`name` returns."""
        result: int = getattr(self._loaded, f"fbitrain_{name}")(*arguments)
        return result

    def why_not(self, level: str) -> str:
        supports: int = self._loaded.fbitrain_supports(_NUMBER[level])
        return {
            1: "",
            0: f"this CPU or operating system has no {_NEEDED[level]}",
            -1: "the C++ compiler cannot build it",
        }[supports]


@functools.cache
def _library() -> Library:
    return Library(build())


@functools.cache
def levels() -> Mapping[str, str]:
    """Of each level why it does not run here, "" if it does. Builds the library; says so once if that fails."""
    try:
        library = _library()
    except BuildError as error:
        warnings.warn(f"{error}. Until then the binary ops run in plain torch, slowly.", RuntimeWarning, stacklevel=2)
        return MappingProxyType(dict.fromkeys(LEVELS, str(error)))
    return MappingProxyType({level: library.why_not(level) for level in LEVELS})


def status_of(op: str, level: str, *arguments: int | None) -> int:
    """What the C function of `op` returns for the level's number, torch's number of threads and `arguments`."""
    return _library().call(op, _NUMBER[level], torch.get_num_threads(), *arguments)


def call(op: str, level: str, *arguments: int | None) -> None:
    """Calls the C function of `op` as `status_of` does. Raises what `require_ok` does."""
    require_ok(status_of(op, level, *arguments), op)


def screen_bytes(columns: int) -> int:
    """Bytes of a row of a screen of a head (csrc/head_screen.h); 0 where there is none for so many columns."""
    return _library().call("screen_bytes", columns)


def kernel(op: str, level: str) -> Callable[..., Tensor]:
    """The function that runs `op` (the arguments are those of its reference) with the instructions of `level`."""
    return functools.partial(_RUN[op], level)


def transpose_signs(words: Tensor, k: int) -> Tensor:
    """The packed signs of Wᵀ, int32 [k, ceil(N / 32)], from those of W: contiguous int32 [N, ceil(k / 32)]."""
    n = words.shape[0]
    transposed = torch.empty((k, n_words(n)), dtype=torch.int32, device="cpu")
    pointers = words.data_ptr(), transposed.data_ptr()
    require_ok(_library().call("transpose_signs", torch.get_num_threads(), *pointers, n, k), "transpose_signs")
    return transposed


def interleave(level: str, words: Tensor, k: int) -> Tensor | None:
    """The bits of packed signs, contiguous int32 [N, ceil(k / 32)], in the order in which `level` looks them up: int32
    [`interleaved_words`(N, k)]. None where the level looks nothing up."""
    n = words.shape[0]
    if not _library().call("interleaved_bytes", _NUMBER[level], n, k):
        return None
    interleaved = torch.empty(interleaved_words(n, k), dtype=torch.int32, device="cpu")
    call("interleave", level, words.data_ptr(), interleaved.data_ptr(), n, k)
    return interleaved


def _pack_signs(level: str, w: Tensor) -> Tensor:
    w = w.detach().contiguous()
    k = w.shape[-1]
    words = torch.empty((*w.shape[:-1], n_words(k)), dtype=torch.int32, device="cpu")
    rows = w.numel() // max(k, 1)
    call("pack_signs", level, _FORMAT[w.dtype], w.data_ptr(), words.data_ptr(), rows, k)
    return words


def _unpack_signs(level: str, words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    words = words.contiguous()
    signs = torch.empty((*words.shape[:-1], k), dtype=dtype, device="cpu")
    rows = signs.numel() // max(k, 1)
    call("unpack_signs", level, _FORMAT[dtype], words.data_ptr(), signs.data_ptr(), rows, k)
    return signs


def _xnor_gemm(level: str, a: Tensor, b: Tensor, k: int) -> Tensor:
    m, n = a.shape[0], b.shape[0]
    product = torch.empty((m, n), dtype=torch.int32, device="cpu")
    call("xnor_gemm", level, a.data_ptr(), b.data_ptr(), product.data_ptr(), m, n, k)
    return product


def _binary_linear(
    level: str, x: Tensor, weight: BinaryWeight, mode: str = "float", interleaved: Tensor | None = None
) -> Tensor:
    """`interleaved` is what `interleave` made of the words: a decoder multiplies so, and bench.py and the tests here.
    It changes no result of "int8"; "float" then rounds x (times α for scale "column") to 24 bits of the token's largest
    magnitude, in place of its sums.
    """
    beta = None if weight.beta is None else weight.beta.float()
    tensors = interleaved, weight.alpha.float(), beta
    return _multiply("binary_linear", level, x, weight, mode, tensors, weight.group_size, scale=weight.scale)


def _mixture_linear(level: str, x: Tensor, weight: MixtureWeight, mode: str = "float") -> Tensor:
    tensors = weight.gates.contiguous(), weight.alpha_in.float(), weight.alpha_out.float()
    return _multiply("mixture_linear", level, x, weight, mode, tensors, weight.alpha_in.shape[0])


def _partial_linear(level: str, x: Tensor, weight: PartialWeight, mode: str = "float") -> Tensor:
    tensors = weight.alpha.float(), weight.row_starts, weight.columns, weight.values, weight.value_scale
    sizes = weight.group_size, weight.columns.numel()
    return _multiply("partial_linear", level, x, weight, mode, tensors, *sizes, scale=weight.scale)


def _multiply(
    op: str,
    level: str,
    x: Tensor,
    weight: BinaryWeight | MixtureWeight | PartialWeight,
    mode: str,
    tensors: tuple[Tensor | None, ...],
    *sizes: int,
    scale: str = "",
) -> Tensor:
    """Calls the C function of `op` (csrc/linear_calls.cpp), which takes level, threads, mode, whether x is bfloat16 and
    the pattern `scale`, if there is one; then x, words, `tensors` and y; then M, N, K and `sizes`."""
    x, n, k = x.contiguous(), weight.words.shape[0], weight.k
    y = x.new_empty((*x.shape[:-1], n))
    settings = [MODES.index(mode), x.dtype is torch.bfloat16]
    if scale:
        settings.append(SCALES.index(scale))
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (x, weight.words, *tensors, y)]
    status = status_of(op, level, *settings, *pointers, x.numel() // k, n, k, *sizes)
    if status > 0:
        raise not_finite(status - 1, x.shape)
    if status == -4 and isinstance(weight, PartialWeight):
        raise ValueError(
            f"{op}: row_starts must ascend from 0 to the {weight.columns.numel()} entries, and the columns of each row "
            f"must ascend, from 0 to {k - 1} at most"
        )
    require_ok(status, op)
    return y


def require_ok(status: int, op: str) -> None:
    """Raises unless `status`, which the C function of `op` returned, is kOk (csrc/kernels.h)."""
    if status == -3:
        raise MemoryError(f"{op}: not enough memory for its working buffers")
    assert status == 0, f"{op} was called with arguments that it refuses: status {status}"


_RUN: dict[str, Callable[..., Tensor]] = {
    "pack_signs": _pack_signs,
    "unpack_signs": _unpack_signs,
    "xnor_gemm": _xnor_gemm,
    "binary_linear": _binary_linear,
    "mixture_linear": _mixture_linear,
    "partial_linear": _partial_linear,
}
