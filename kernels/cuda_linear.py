"""binary_linear, mixture_linear and partial_linear as CUDA kernels, on any Device. They take what `ops` has checked.

Letters: N out_features, K in_features, Kw = ceil(K / 32) words, M tokens, E scaling experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from fbitrain.kernels.checks import not_finite
from fbitrain.kernels.cuda_linear_plan import PRODUCT_TENSORS, PROLOGUE_TENSORS, LinearCall, plan_linear
from fbitrain.kernels.cuda_run import Device, dtype_name, run
from fbitrain.kernels.reference import salient_places
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of x
_CHECKED = WeakTensorKeyDictionary()  # columns of salient weights -> their row_starts and the state of both


def binary_linear(device: Device, x: Tensor, weight: BinaryWeight, mode: str = "float") -> Tensor:
    """reference.binary_linear; `group_size` must be a multiple of 32."""
    words, alpha, beta, scale, _, group_size = weight
    column = scale == "column"
    tensors = {"words": words, ("alpha_K" if column else "alpha"): alpha.float()}
    if beta is not None:
        tensors["beta_K" if column else "beta"] = beta.float()
    call = LinearCall(*_sizes(x, weight), mode, scale, group_size=group_size, has_shift=beta is not None)
    return _multiply(device, call, x, tensors)


def mixture_linear(device: Device, x: Tensor, weight: MixtureWeight, mode: str = "float") -> Tensor:
    """reference.mixture_linear, but 16-bit activations times their scales are rounded to their dtype again."""
    words, gates, alpha_in, alpha_out, _ = weight
    call = LinearCall(*_sizes(x, weight), mode, n_experts=alpha_in.shape[0])
    scales = {"alpha_in": alpha_in.float(), "alpha_out": alpha_out.float()}
    return _multiply(device, call, x, {"words": words, "gates": gates.contiguous(), **scales})


def partial_linear(device: Device, x: Tensor, weight: PartialWeight, mode: str = "float") -> Tensor:
    """reference.partial_linear; `group_size` must be a multiple of 32. Waits for the GPU when a weight is new to it."""
    _check_salient(weight.row_starts, weight.columns, weight.k)
    call = LinearCall(
        *(*_sizes(x, weight), mode, weight.scale),
        group_size=weight.group_size,
        column_bytes=weight.columns.element_size(),
        value_bytes=weight.values.element_size(),
    )
    tensors = {name: value for name, value in weight._asdict().items() if isinstance(value, Tensor)}
    return _multiply(device, call, x, {**tensors, "alpha": weight.alpha.float()})


def _sizes(x: Tensor, weight: BinaryWeight | MixtureWeight | PartialWeight) -> tuple[int, int, int, str]:
    """M, N, K and the dtype of x."""
    return x.numel() // weight.k, weight.words.shape[0], weight.k, dtype_name(x.dtype)


def _multiply(device: Device, call: LinearCall, x: Tensor, given: dict[str, Tensor]) -> Tensor:
    """Launches the plan of `call` with x and the tensors `given` by name: y [..., N].

    Raises ValueError for int8 activations that are not finite. Only the GPU knows whether they are: asking costs one
    wait per call, after everything has been launched.
    """
    absent = dict.fromkeys((*PRODUCT_TENSORS, *PROLOGUE_TENSORS))
    x_MK = x.detach().reshape(-1, call.k).contiguous()
    arrays = run(plan_linear(call, device.capability), device, {**absent, **given, "x": x_MK})
    if "token_scale" in arrays:
        _refuse_infinite(arrays["token_scale"], call.k)
    return arrays["y"].reshape(*x.shape[:-1], call.n)


def _check_salient(row_starts: Tensor, columns: Tensor, k: int) -> None:
    """Raises ValueError unless each row's columns ascend within [0, k): the kernels read where they point.

    Looks at the entries themselves, and so waits for the GPU, only if these tensors have not been seen together yet or
    were changed since. Tensors made under torch.inference_mode do not count their changes and are looked at in every
    call: a weight that was loaded outside it is faster.
    """
    if row_starts.is_inference() or columns.is_inference():
        salient_places(row_starts, columns, k)
        return
    state = (row_starts._version, row_starts.data_ptr(), columns._version, columns.data_ptr(), k)
    partner, seen = _CHECKED.get(columns, (None, None))  # type: ignore[no-untyped-call]
    if seen == state and partner() is row_starts:
        return
    salient_places(row_starts, columns, k)
    _CHECKED[columns] = TensorWeakRef(row_starts), state


def _refuse_infinite(token_scale: Tensor, k: int) -> None:
    """Raises reference.quantize_int8's ValueError: a token's scale is NaN or infinite if one of its activations is."""
    infinite = ~torch.isfinite(token_scale)
    if bool(infinite.any()):
        raise not_finite(int(infinite.nonzero()[0]), (len(token_scale), k))
