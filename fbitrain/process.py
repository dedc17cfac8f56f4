"""A rank's process: the device it computes on, its compute dtype, threads, memory, and time-outs. No DeepSpeed."""

from __future__ import annotations

import ctypes
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from fbitrain import slurm
from fbitrain.config import Config

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h


def on_gpu() -> bool:
    """Whether ranks compute on GPUs; DS_ACCELERATOR=cpu says no on a machine that has some."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def resolve_precision(precision: str) -> torch.dtype:
    """The compute dtype: `auto` is bf16 where the device multiplies it natively, else fp32."""
    if precision == "auto":
        precision = "bf16" if native_bf16() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def native_bf16() -> bool:
    """Whether bf16 matrix products run in hardware; emulated, they are some 60 times slower than fp32 (docs/log.md)."""
    if on_gpu():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def set_threads(config: Config) -> None:
    """The launcher sets no thread count, and ranks that each use every core trample on one another."""
    threads = config.engine.threads_per_rank
    if not threads:
        share = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1"))
        threads = slurm.cores_of_rank() or max(1, share)
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """glibc returns large blocks at once and faults them in again for the next tensor: a tenth of a CPU step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def set_timeouts(seconds: float) -> None:
    """DeepSpeed's cloned process groups keep a timeout of 30 minutes whatever init_distributed was told."""
    groups = dist.distributed_c10d._world.pg_map
    for group in list(groups):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
