"""A log line: one set of scalars to metrics.jsonl, TensorBoard and the console."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from fbitrain.checkpoint_files import TrainerState
from fbitrain.model.phases import binary_share, has_phases
from fbitrain.optim.schedules import lr_at
from fbitrain.stragglers import straggler
from fbitrain.tracking import router_scalars
from fbitrain.utilization import memory_scalars, peak_tflops

if TYPE_CHECKING:
    from fbitrain.build import Parts
    from fbitrain.engine import Engine


def log(parts: Parts, state: TrainerState, bar: tqdm[Any]) -> None:
    """One line of scalars to metrics.jsonl, TensorBoard and the console."""
    scalars = parts.interval.close(parts.config.distill)
    parts.interval.pause("logging")
    scalars["optim/lr"] = lr_at(parts.config, state.step)
    scalars |= {f"lr/{kind}": rate for kind, rate in parts.engine.rates().items()}
    scalars |= {f"update_ratio/{kind}": ratio for kind, ratio in parts.engine.shards.update_ratios().items()}
    if has_phases(parts.config.binarize):
        scalars["phase/binary_share"] = binary_share(parts.config.binarize, state.step)
    achieved = scalars["speed/tokens_per_s"] * parts.flops_per_token / parts.engine.world_size / 1e12
    scalars["speed/tflops_per_rank"] = achieved
    if peak := peak_tflops(parts.config, parts.engine.device):
        scalars["speed/mfu"] = achieved / peak
    scalars |= parts.signs.look() | parts.scales.look() | router_scalars(parts.engine)
    scalars |= memory_scalars(parts.engine.device) | data_scalars(parts.loader.stats(), parts.engine)
    parts.writer.scalars(state.step, state.tokens, scalars)
    line = (
        f"step {state.step}/{parts.config.train.total_steps} | loss {scalars['train/loss']:.4f} | "
        f"lr {scalars['optim/lr']:.2e} | grad norm {scalars['optim/grad_norm']:.2f} | "
        + (f"binary {scalars['phase/binary_share']:.0%} | " if "phase/binary_share" in scalars else "")
        + (f"signs flipped {scalars['signs/flipped']:.2%} | " if "signs/flipped" in scalars else "")
        + f"{scalars['speed/tokens_per_s']:.0f} tokens/s"
    )
    if parts.rank == 0:
        bar.write(line, file=sys.stdout)
        if slow := straggler(scalars, parts.hosts):
            bar.write(slow, file=sys.stdout)
        sys.stdout.flush()
    parts.interval.run()


def data_scalars(stats: Mapping[str, Any], engine: Engine) -> dict[str, float]:
    """The streams' counters as data/… scalars, summed over all ranks; epochs are their mean. Collective."""
    scalars: dict[str, float] = {}
    for key, value in stats.items():
        if isinstance(value, Mapping):
            scalars |= {f"data/{key}/{inner}": float(number) for inner, number in value.items()}
        else:
            scalars[f"data/{key}"] = float(value)
    # Every rank has the same sources, so the same names in the same order.
    sums = torch.tensor(list(scalars.values()), dtype=torch.float64, device=engine.device)
    dist.all_reduce(sums)
    return {
        name: total / engine.world_size if name.startswith("data/epochs/") else total
        for name, total in zip(scalars, sums.tolist(), strict=True)
    }
