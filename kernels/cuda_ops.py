"""The packing ops and xnor_gemm as CUDA kernels, on any Device. They take what `ops` has checked."""

from __future__ import annotations

import torch
from torch import Tensor

from fbitrain.kernels.cuda_plan import plan_pack_signs, plan_unpack_signs, plan_xnor_gemm
from fbitrain.kernels.cuda_run import Device, dtype_name, run

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of pack_signs and unpack_signs


def pack_signs(device: Device, w: Tensor) -> Tensor:
    k = w.shape[-1]
    plan = plan_pack_signs(w.numel() // max(k, 1), k, dtype_name(w.dtype))
    words = run(plan, device, {"w": w.detach().contiguous()})["words"]
    return words.reshape(*w.shape[:-1], words.shape[-1])


def unpack_signs(device: Device, words: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    plan = plan_unpack_signs(words.numel() // max(words.shape[-1], 1), k, dtype_name(dtype))
    return run(plan, device, {"words": words.contiguous()})["signs"].reshape(*words.shape[:-1], k)


def xnor_gemm(device: Device, a: Tensor, b: Tensor, k: int) -> Tensor:
    plan = plan_xnor_gemm(a.shape[0], b.shape[0], k, device.capability)
    return run(plan, device, {"a": a, "b": b})["product"]
