"""How much of the hardware a run uses: FLOPs per token, a device's peak, memory."""

from __future__ import annotations

import psutil
import torch

from fbitrain.config import Config

# Dense bf16 peaks per device from the vendors' data sheets, by a part of the device's name; for MFU.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "A10": 125.0, "V100": 125.0}


def flops_per_token(config: Config, matrix_weights: int, teacher_weights: int) -> float:
    """Per trained token, a multiply-add counted as 2: 6 per student matrix weight, 2 per teacher weight, attention.

    Recomputation under activation checkpointing is not counted (the PaLM convention for MFU).
    """
    model = config.model
    # Causal: half the square, forward and backward.
    attention = 6 * 2 * model.n_layers * model.d_model * config.data.seq_len / 2
    return 6 * matrix_weights + attention + 2 * teacher_weights


def peak_tflops(config: Config, device: torch.device) -> float:
    """The rank's peak in TFLOP/s: configured, or looked up by the GPU's name; 0 if unknown."""
    if config.metrics.peak_tflops or device.type != "cuda":
        return config.metrics.peak_tflops
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def memory_scalars(device: torch.device) -> dict[str, float]:
    """This rank's memory in GiB."""
    scalars = {"memory/resident_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        scalars["memory/device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return scalars
