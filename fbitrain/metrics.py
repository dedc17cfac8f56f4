"""What a run reports: sums kept on the device, one reduction per interval, to metrics.jsonl and TensorBoard alike."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fbitrain.base.files import fsync_file, write_text
from fbitrain.config import Config, DistillConfig
from fbitrain.distill import DistillMetrics
from fbitrain.model.mixture import MixtureOfScalesLinear

if TYPE_CHECKING:
    from fbitrain.engine import Engine

# Dense bf16 peaks per device from the vendors' data sheets, by a part of the device's name; for MFU.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "4090": 165.0, "A10": 125.0, "V100": 125.0}
_SUMS = ("kd", "teacher_entropy", "label_ce", "teacher_label_ce", "top1_agreement", "hidden_mse", "tokens")


class Interval:
    """Sums over micro-batches and steps since the last log line. Nothing here waits for the device until `close`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._sums = torch.zeros(len(_SUMS) + 2, dtype=torch.float64, device=self._device)  # + loss, grad norm
        self._micro_batches = self._steps = 0
        self._seconds = 0.0
        self._started: float | None = None

    def run(self) -> None:
        """(Re)starts the clock, which evaluation and saving stop."""
        self._started = time.perf_counter()

    def pause(self) -> None:
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
            self._started = None

    def add_micro_batch(self, loss: Tensor, metrics: DistillMetrics) -> None:
        parts = [getattr(metrics, name) for name in _SUMS]
        self._sums[:-1] += torch.stack(
            [torch.as_tensor(p, dtype=torch.float64, device=self._device) for p in (*parts, loss.detach())]
        )
        self._micro_batches += 1

    def add_step(self, grad_norm: Tensor) -> None:
        self._sums[-1] += grad_norm
        self._steps += 1

    def gradients_finite(self) -> bool:
        """Whether every gradient norm since the last log line is a number; the same answer on every rank."""
        return bool(torch.isfinite(self._sums[-1]))

    def close(self, distill: DistillConfig) -> dict[str, float]:
        """Means over the interval and all ranks, then starts a new one. Collective."""
        self.pause()
        sums = self._sums.clone()
        dist.all_reduce(sums)
        values = dict(zip((*_SUMS, "loss", "grad_norm"), sums.tolist(), strict=True))
        world, tokens = dist.get_world_size(), max(values["tokens"], 1.0)
        scalars = {
            "train/loss": values["loss"] / (world * max(self._micro_batches, 1)),
            "train/label_ce": values["label_ce"] / tokens,
            "optim/grad_norm": values["grad_norm"] / (world * max(self._steps, 1)),
            "speed/tokens_per_s": values["tokens"] / max(self._seconds, 1e-9),
        }
        if distill.hidden_weight > 0:
            scalars["train/hidden_mse"] = values["hidden_mse"] / tokens
        if distill.kd_weight > 0:
            scalars |= {
                "train/kd": values["kd"] / tokens,
                "train/top1_agreement": values["top1_agreement"] / tokens,
                "teacher/entropy": values["teacher_entropy"] / tokens,
                "teacher/label_ce": values["teacher_label_ce"] / tokens,
            }
        self._reset()
        self.run()
        return scalars


def router_scalars(engine: Engine) -> dict[str, float]:
    """Mean entropy of the routers in nats and the share of each expert since the last look, over layers and ranks.

    Nothing if no layer has a router. Collective.
    """
    layers = [module for module in engine.student.modules() if isinstance(module, MixtureOfScalesLinear)]
    if not layers:
        return {}
    sums = torch.stack([layer.take_router_stats() for layer in layers]).sum(0).to(engine.device)
    dist.all_reduce(sums)
    entropy, tokens, *loads = sums.tolist()
    if not tokens:  # the layers are in full precision
        return {}
    return {"router/entropy": entropy / tokens} | {f"router/load_{i}": load / tokens for i, load in enumerate(loads)}


def flops_per_token(config: Config, matrix_weights: int, teacher_weights: int) -> float:
    """Per trained token, a multiply-add counted as 2: 6 per student matrix weight, 2 per teacher weight, attention.

    Recomputation under activation checkpointing is not counted (the PaLM convention for MFU).
    """
    model = config.model
    attention = (
        6 * 2 * model.n_layers * model.d_model * config.data.seq_len / 2
    )  # causal: half the square, forward and backward
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


class Writer:
    """metrics.jsonl and TensorBoard of a run; on ranks other than 0 it does nothing.

    Lines after `step` are dropped: a resumed run repeats those steps.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        self._active = dist.get_rank() == 0
        if not self._active:
            return
        self._path = run_dir / "metrics.jsonl"
        write_text(self._path, "".join(line + "\n" for line in lines_up_to(self._path, step or -1)))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1 if step else 0)

    def scalars(self, step: int, tokens: int, scalars: Mapping[str, float]) -> None:
        if self._active:
            line = {"step": step, "tokens": tokens, "time": round(time.time(), 3), **scalars}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        if self._active:
            for name, text in texts.items():
                self._board.add_text(name, f"```\n{text}\n```", step)

    def histograms(self, step: int, values: Mapping[str, Tensor]) -> None:
        if self._active:
            for name, tensor in values.items():
                if not torch.isfinite(tensor).all():
                    continue
                kind = name.rsplit(".", 1)[-1]
                self._board.add_histogram(f"{kind}/{name.removeprefix('model.')}", tensor.numpy(), step)
            self._board.flush()

    def close(self) -> None:
        if self._active:
            self._file.close()
            fsync_file(self._path)
            self._board.close()


class BatchLog:
    """debug.log_batches: a hash of every micro-batch, so that two runs can be compared batch by batch."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._file = (run_dir / f"batches_rank{rank:05d}.jsonl").open("a", encoding="utf-8")

    def add(self, step: int, batch: Tensor) -> None:
        digest = hashlib.sha256(batch.numpy().tobytes()).hexdigest()
        self._file.write(json.dumps({"step": step, "sha256": digest}) + "\n")
        self._file.flush()


class DocumentLog:
    """debug.log_documents: which documents begin in each step's batches, so that none is missed or read twice."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._file = (run_dir / f"documents_rank{rank:05d}.jsonl").open("a", encoding="utf-8")

    def add(self, step: int, documents: Sequence[str]) -> None:
        self._file.write(json.dumps({"step": step, "documents": documents}) + "\n")
        self._file.flush()


def lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to `step`; a last line that a crash cut short is dropped."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    return kept
