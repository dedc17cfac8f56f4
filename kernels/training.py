"""Products with the signs of a latent float weight, for training: from its bits where that is faster than torch.

A weight is packed anew for each product, which takes less time than making its signs as floats and less memory by a
factor of 32. Which way is taken is a pure function of backend, dtype and sizes (`pays`); docs/kernels-measured.md has
the measurements behind it.

Letters: N out_features, K in_features, M tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fbitrain.kernels import cpu, ops
from fbitrain.kernels.dispatch import Call, backend_name
from fbitrain.kernels.reference import sign
from fbitrain.kernels.weights import BinaryWeight

MEASURED = ("avx2", "avx512", "amx")
MIN_WORK = 2**24  # weights times tokens; below it the overhead of the calls decides


def sign_matmul(z: Tensor, weight: Tensor, add: Tensor | None = None) -> Tensor:
    """z [M, K] times sign(weight [N, K])ᵀ plus add [M, 1]: [M, N] in z's dtype. No gradient is recorded where the bits
    are used.

    `add` joins the sum before it is rounded to z's dtype. Under autocast torch multiplies, in autocast's dtype.
    """
    if not _from_bits(z, weight):
        signs_KN = sign(weight).to(z.dtype).T
        return z @ signs_KN if add is None else torch.addmm(add, z, signs_KN)
    product = _product(z, ops.pack_signs(weight.detach()))
    return product if add is None else product.add_(add)


def sign_matmul_of_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dy [M, N] times sign(weight [N, K]): the gradient [M, K] of `sign_matmul`'s z, in dy's dtype."""
    if not _from_bits(dy, weight):
        return dy @ sign(weight).to(dy.dtype)
    words = ops.pack_signs(weight.detach())
    return _product(dy, cpu.transpose_signs(words, weight.shape[1]))


def pays(backend: str, dtype: torch.dtype, m: int, n: int, k: int) -> bool:
    """Whether packing and the kernels of `backend` beat torch: measured in fp32, and assumed nowhere else."""
    return backend in MEASURED and dtype == torch.float32 and m * n * k >= MIN_WORK


def _from_bits(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != torch.float32 or not x.is_cpu or not weight.is_cpu or not _is_plain(x):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return pays(backend_name(Call("binary_linear", "cpu", x.dtype)), x.dtype, x.shape[0], *weight.shape)


def _is_plain(x: Tensor) -> bool:
    """Whether x has memory of its own to read, and nothing compiles, traces, transforms or intercepts what is done with
    it: transposing the bits is a C function that torch does not know of."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
    )


def _product(x: Tensor, words: Tensor) -> Tensor:
    k = x.shape[1]
    with torch.no_grad():
        return ops.binary_linear(x, BinaryWeight(words, x.new_ones(1, 1), None, "tensor", k))
