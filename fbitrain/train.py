"""train(config): the loop. Read this file first; build.py makes the parts, ranks.py keeps the ranks together.

A step is an optimizer step. The engine owns mechanics, this file owns their order.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fbitrain import checkpoint
from fbitrain.base.errors import UserError
from fbitrain.build import Parts, build
from fbitrain.checkpoint_files import TrainerState
from fbitrain.checkpoint_folders import find_latest
from fbitrain.config import Config
from fbitrain.engine import Engine, init_distributed
from fbitrain.evaluation import evaluate
from fbitrain.fine_tune import needs_calibration, with_known_sizes
from fbitrain.lost_ranks import lost_ranks_named
from fbitrain.model.phases import binary_share, has_phases
from fbitrain.optim.schedules import batch_tokens_at, lr_at
from fbitrain.phases import enter_step
from fbitrain.process import device
from fbitrain.ranks import StreamError, agreed, from_rank_0, on_all_ranks, say
from fbitrain.run_folder import finished, write_finished, write_stopped
from fbitrain.stopping import Stop
from fbitrain.tracking import router_scalars
from fbitrain.utilization import memory_scalars, peak_tflops


def train(config: Config) -> None:
    """Trains until train.total_steps or a stop signal; every rank calls it.

    Raises UserError for what the user can mend; one that is raised on all ranks has `on_all_ranks` set.
    """
    rank, world_size = init_distributed(config)
    with ExitStack() as closed_last, lost_ranks_named(config.run_dir):
        config = agreed(lambda: with_known_sizes(config, world_size))
        if done := finished(config):
            say(done)
        else:
            stop = Stop(config.checkpoint, device())
            parts, state = build(config, rank, world_size)
            closed_last.callback(parts.close)  # takes rank 0 a while, in which others may leave
            run_steps(parts, state, stop)
            dist.barrier()
    dist.destroy_process_group()


def run_steps(parts: Parts, state: TrainerState, stop: Stop) -> None:
    """All steps that are left, with what happens between them."""
    config, rank = parts.config, parts.rank
    if state.step == 0:
        model = {"model/bits_per_weight": parts.bits_per_weight, "model/flops_per_token": parts.flops_per_token}
        parts.writer.scalars(0, 0, model)
        save_start(parts, state)
        if config.eval.every:
            evaluate(parts, state)
    bar = tqdm(total=config.train.total_steps, initial=state.step, unit="step", disable=None if rank == 0 else True)
    saved_step = state.step
    data_state: Mapping[str, Any] = {}  # behind the last finished step
    stop.saved()
    parts.interval.run()
    while state.step < config.train.total_steps and not stop.agreed:
        try:
            behind = train_step(parts, state, stop)
        except StreamError as error:
            if state.step > saved_step:
                save(parts, state, data_state)
            raise on_all_ranks(error) from None
        if behind is None:  # nothing of the step stays: a run that resumes takes all of it again
            if state.step > saved_step:
                save(parts, state, data_state)
            break
        data_state = behind
        state = TrainerState(state.step + 1, state.tokens + batch_tokens_at(config.train, state.step + 1))
        bar.update()
        last = state.step == config.train.total_steps
        if state.step % config.metrics.every == 0 or last:
            log(parts, state, bar)
        # Saving comes before evaluating: a launcher gives a stopped run half a minute.
        if state.step % config.checkpoint.every == 0 or last or stop.agreed or stop.save_due:
            saved_step = save(parts, state, data_state)
            stop.saved()
        if config.eval.every and (last or (state.step % config.eval.every == 0 and not stop.agreed)):
            evaluate(parts, state)
    bar.close()
    leave_marker(parts, state, stop)


def train_step(parts: Parts, state: TrainerState, stop: Stop) -> Mapping[str, Any] | None:
    """One optimizer step; returns the data state after its last batch, None if the ranks stopped in the middle of it.

    Raises StreamError on all ranks, before the update, if the stream of any of them fails.
    """
    config, engine = parts.config, parts.engine
    enter_step(engine, config.binarize, state.step)
    n_micro_batches = config.grad_accum_steps(engine.world_size, state.step + 1)
    engine.set_grad_accum_steps(n_micro_batches)
    stop.begin_step(n_micro_batches)
    failure = ""
    finite = torch.ones((), dtype=torch.bool, device=engine.device)
    for i in range(n_micro_batches):
        batch, cached = parts.blank_batch, None
        if not failure:
            try:
                batch = next(parts.loader)
                cached = parts.targets.read(parts.loader.spans())
            except UserError as error:  # the other ranks are in the middle of a step: take part in it, then tell them
                failure = str(error)
        if parts.batch_log:
            parts.batch_log.add(batch)
        batch = batch.to(engine.device, non_blocking=True)
        loss, metrics = engine(batch, **parts.targets.ask(batch, cached))
        engine.backward(loss)
        parts.interval.add_micro_batch(loss, metrics)
        finite &= torch.isfinite(loss.detach())
        if i == n_micro_batches - 1:
            # The one host wait of a step, where DeepSpeed is about to wait for the gradient norm anyway.
            agree_to_go_on(parts, state, stop, finite, failure)
        elif stop.drops_step(left=n_micro_batches - 1 - i):
            return None
        engine.end_micro_batch(state.step + 1)
    parts.interval.add_step(engine.grad_norm())
    if parts.batch_log:
        parts.batch_log.end_step(state.step + 1)
    if parts.document_log:
        parts.document_log.add(state.step + 1, parts.loader.take_documents())
    return parts.loader.state()


def agree_to_go_on(parts: Parts, state: TrainerState, stop: Stop, finite: Tensor, failure: str) -> None:
    """All ranks learn if any is to stop or to save, and raise, before the update, if any loss or stream is broken."""
    flags = [~finite, *(torch.tensor(flag) for flag in (bool(failure), *stop.wishes()))]
    shared = torch.stack([flag.to(finite.device) for flag in flags]).to(torch.int32)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    broken, failed, stopping, saving = (bool(flag) for flag in shared.tolist())
    stop.agree(stopping, saving)
    if failed:
        failures: list[str] = [""] * parts.engine.world_size
        dist.all_gather_object(failures, failure)
        raise StreamError(next(message for message in failures if message))
    if broken:
        latest = find_latest(parts.config.run_dir)
        raise on_all_ranks(
            UserError(
                f"the loss of step {state.step + 1} is not finite; stopped before the update. "
                + (f"The last good checkpoint is {latest}; " if latest else "No checkpoint was written yet; ")
                + f"{suspects(parts.config, state.step + 1)}, then start again"
            )
        )


def require_finite_gradients(parts: Parts, state: TrainerState) -> None:
    """DeepSpeed skips an update whose gradient norm is not finite and goes on; a run should not."""
    if not parts.interval.gradients_finite():
        raise on_all_ranks(
            UserError(
                f"a gradient norm up to step {state.step} is not finite; nothing was saved, older checkpoints stay; "
                f"{suspects(parts.config, state.step)}, then start again"
            )
        )


def suspects(config: Config, step: int) -> str:
    """What to do about a number that is not finite at 1-based `step`; at the first one no learning rate is to blame."""
    if step > 1:
        return "lower optim.lr or check the data"
    start = f"model.pretrained={config.model.pretrained}" if config.model.pretrained else "model.init_std"
    teacher = f"the teacher {config.distill.teacher}, " if config.distill.needs_teacher else ""
    return f"nothing was trained before it: check {teacher}what the student starts from ({start}) and the data"


# -- what happens between steps ---------------------------------------------------------------------------------------


def log(parts: Parts, state: TrainerState, bar: tqdm[Any]) -> None:
    """One line of scalars to metrics.jsonl, TensorBoard and the console."""
    require_finite_gradients(parts, state)
    scalars = parts.interval.close(parts.config.distill)
    parts.interval.pause()
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


def save(parts: Parts, state: TrainerState, data_state: Mapping[str, Any]) -> int:
    """Writes the checkpoint of this step; returns the step."""
    parts.interval.pause()
    require_finite_gradients(parts, state)
    started = time.perf_counter()
    try:
        folder = checkpoint.save(parts.engine, parts.config, state, data_state, parts.loader.shard_list())
    except UserError as error:
        raise on_all_ranks(error) from None
    say(f"saved {folder} in {time.perf_counter() - started:.1f} s")
    parts.interval.run()
    return state.step


def save_start(parts: Parts, state: TrainerState) -> None:
    """The checkpoint of step 0, where there is something to keep: what calibration found, or all that a run of no steps
    gives."""
    config = parts.config
    if config.train.total_steps and not needs_calibration(config):
        return
    if from_rank_0(lambda: find_latest(config.run_dir)) is None:
        save(parts, state, parts.loader.state())


def leave_marker(parts: Parts, state: TrainerState, stop: Stop) -> None:
    """FINISHED.json or STOPPED.json: launchers do not pass exit codes on faithfully."""
    config = parts.config
    done = state.step >= config.train.total_steps
    from_rank_0(lambda: write_finished(config, state) if done else write_stopped(config, state, stop.reason))
    if not done:
        say(f"stopped by {stop.reason} after step {state.step}; with train.resume=auto it goes on from there")
