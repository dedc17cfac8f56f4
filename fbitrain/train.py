"""train(config): the loop. Read this file first; build.py makes the parts, ranks.py keeps the ranks together.

A step is an optimizer step. The engine owns mechanics, this file owns their order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fbitrain import resume
from fbitrain.base.errors import UserError
from fbitrain.build import Parts, build
from fbitrain.checkpoint_files import TrainerState, trainer_state
from fbitrain.checkpoint_folders import find_latest
from fbitrain.config import Config
from fbitrain.engine import init_distributed
from fbitrain.evaluation import evaluate
from fbitrain.fine_tune import needs_calibration, with_known_sizes
from fbitrain.hangs import hangs_named
from fbitrain.log_line import log
from fbitrain.lost_ranks import lost_ranks_named
from fbitrain.optim.schedules import batch_tokens_at
from fbitrain.phases import enter_step
from fbitrain.process import device
from fbitrain.ranks import StreamError, agreed, from_rank_0, on_all_ranks, say
from fbitrain.run_folder import finished, write_finished, write_stopped
from fbitrain.spikes import MOST_IN_A_ROW, SpikeError, fault_of_gradient, fault_of_loss, require_progress, suspects
from fbitrain.stopping import Stop
from fbitrain.student import CachedTargets


def train(config: Config) -> None:
    """Trains until train.total_steps or a stop signal; every rank calls it.

    Raises UserError for what the user can mend; one that is raised on all ranks has `on_all_ranks` set.
    """
    rank, world_size = init_distributed(config)
    with ExitStack() as closed_last, lost_ranks_named(config.run_dir) as peers:
        config = agreed(lambda: with_known_sizes(config, world_size))
        if done := finished(config):
            say(done)
        else:
            stop = Stop(config.checkpoint, device())
            parts, state = build(config, rank, world_size)
            closed_last.callback(parts.close)  # takes rank 0 a while, in which others may leave
            with hangs_named(parts.clock, peers, config.run_dir):
                run_steps(parts, state, stop)
            dist.barrier()
    dist.destroy_process_group()


def run_steps(parts: Parts, state: TrainerState, stop: Stop) -> None:
    """All steps that are left, with what happens between them."""
    config, rank = parts.config, parts.rank
    if state.step == 0:
        begin(parts, state)
    bar = tqdm(total=config.train.total_steps, initial=state.step, unit="step", disable=None if rank == 0 else True)
    saved_step = state.step
    rewinds: Counter[Path] = Counter()
    data_state: Mapping[str, Any] = {}  # behind the last finished step
    stop.saved()
    parts.interval.run()
    while state.step < config.train.total_steps and not stop.agreed:
        try:
            parts.profile.before(state.step + 1)
            end = train_step(parts, state, stop)
            if end and end.rewind:
                end = replace(end, state=rewind(parts, end.state, rewinds))
        except (StreamError, SpikeError) as error:
            if state.step > saved_step:
                save(parts, state, data_state)
            wait_for_checkpoint(parts)
            raise on_all_ranks(explained(error, config, state.step + 1)) from None
        if end is None:  # nothing of the step stays: a run that resumes takes all of it again
            if state.step > saved_step:
                save(parts, state, data_state)
            break
        state, data_state = end.state, end.data_state
        parts.profile.after(state.step)
        bar.update()
        last = state.step == config.train.total_steps
        if (state.step % config.metrics.every == 0 or last) and not parts.interval.empty:
            log(parts, state, bar)
        # Saving comes before evaluating: a launcher gives a stopped run half a minute.
        if state.step % config.checkpoint.every == 0 or last or stop.agreed or stop.save_due:
            saved_step = save(parts, state, data_state)
            stop.saved()
        if config.eval.every and (last or (state.step % config.eval.every == 0 and not stop.agreed)):
            evaluate(parts, state)
    bar.close()
    wait_for_checkpoint(parts)
    leave_marker(parts, state, stop)


@dataclass(frozen=True)
class StepEnd:
    """Where the loop and this rank's stream stand behind a step."""

    state: TrainerState
    data_state: Mapping[str, Any]
    rewind: bool = False  # the weights are to be those of the newest checkpoint


def train_step(parts: Parts, state: TrainerState, stop: Stop) -> StepEnd | None:
    """One optimizer step; None if the ranks stopped in the middle of it.

    Raises StreamError on all ranks, before the update, if the stream of any of them fails, and SpikeError if the loss
    or the gradient is at fault and train.on_spike says to stop.
    """
    config, engine, clock = parts.config, parts.engine, parts.clock
    step = state.step + 1
    changed = enter_step(engine, config.binarize, state.step)
    n_sequences = config.sequences_in(step)
    n_micro_batches = parts.loader.begin_step(n_sequences)
    engine.set_grad_accum_steps(n_micro_batches)
    stop.begin_step(n_micro_batches)
    clock.begin_step(step, n_micro_batches, compiles=changed)
    parts.interval.begin_step()
    named = step in config.data.skip_steps
    failure = ""
    losses = torch.zeros((), dtype=torch.float64, device=engine.device)
    for i in range(n_micro_batches):
        clock.enter("data", i + 1)
        batch, cached, failure = (parts.blank_batch, None, failure) if failure else draw(parts, with_targets=not named)
        if not named:
            # Ranks have unlike numbers of sequences where their lanes do not divide evenly: each sequence counts alike.
            share = len(batch) * n_micro_batches * engine.world_size / n_sequences
            loss = backward(parts, batch, cached, share)
            losses += loss
        if i < n_micro_batches - 1:
            with clock.waiting("whether to stop"):
                dropped = stop.drops_step(left=n_micro_batches - 1 - i)
            if dropped:
                return None
            if not named:
                engine.end_micro_batch()
    # The one host wait of a step, where DeepSpeed is about to wait for the gradient norm anyway.
    with clock.waiting("whether to go on"):
        mean_loss = agree_to_go_on(parts, stop, losses / n_micro_batches, failure)
    clock.enter("optimizer")
    if named:
        engine.shards.count_steps(step)
        fault = "it is one of data.skip_steps"
    else:
        fault = update(parts, state, mean_loss)
    return end_step(parts, state, mean_loss, fault, named)


def draw(parts: Parts, *, with_targets: bool) -> tuple[Tensor, CachedTargets | None, str]:
    """The next micro-batch, its targets in a cache, and why there are none: an empty string unless the stream failed.

    The other ranks are in the middle of a step, so a rank whose stream failed takes part in it before it tells them.
    """
    try:
        batch = next(parts.loader)
        cached = parts.targets.read(parts.loader.spans()) if with_targets else None
    except UserError as error:
        return parts.blank_batch, None, str(error)
    if parts.batch_log:
        parts.batch_log.add(batch)
    return batch, cached, ""


def backward(parts: Parts, batch: Tensor, cached: CachedTargets | None, share: float) -> Tensor:
    """Adds the gradient of `share` times the batch's mean loss, and returns that; a batch may have no sequences."""
    engine, clock, empty = parts.engine, parts.clock, not len(batch)
    if empty:  # the other ranks have some, and ZeRO-3 needs every rank in every forward
        batch, cached = parts.blank_batch, None
    batch = batch.to(engine.device, non_blocking=True)
    clock.enter("teacher")
    targets = parts.targets.ask(batch, cached)
    clock.enter("forward")
    loss, metrics = engine(batch, **targets)
    loss = loss * share
    clock.enter("backward")
    engine.backward(loss)
    parts.interval.add_micro_batch(loss, None if empty else metrics)
    return cast(Tensor, loss.detach())


def agree_to_go_on(parts: Parts, stop: Stop, loss: Tensor, failure: str) -> float:
    """All ranks learn if any is to stop or to save, and their mean loss; they raise if any stream or save failed."""
    known = [bool(failure), parts.saver.cannot_write(), *stop.wishes()]
    flags = torch.tensor(known, dtype=torch.float64, device=loss.device)
    shared = torch.cat([flags, loss.double().view(1)])
    dist.all_reduce(shared)
    failed, unwritten, stopping, saving, total = shared.tolist()
    stop.agree(bool(stopping), bool(saving))
    if unwritten:
        parts.saver.wait()
    if failed:
        failures: list[str] = [""] * parts.engine.world_size
        dist.all_gather_object(failures, failure)
        raise StreamError(next(message for message in failures if message))
    return float(total / parts.engine.world_size)


def update(parts: Parts, state: TrainerState, loss: float) -> str:
    """Updates the weights unless loss or gradient is at fault; returns that fault. SpikeError if it is to stop."""
    train, means, step = parts.config.train, state.means, state.step + 1
    fault = fault_of_loss(train, means, loss)
    fault = fault and f"the loss of step {step} {fault}"

    def of_gradient(norm: float) -> str:
        found = fault_of_gradient(train, means, norm)
        return found and f"the gradient norm of step {step} {found}"

    if not fault or train.on_spike != "stop":
        fault = parts.engine.end_step(step, fault, of_gradient)
    if fault and train.on_spike == "stop":
        raise SpikeError(f"{fault}; stopped before the update")
    if fault:
        require_progress(means, fault)
    return fault


def end_step(parts: Parts, state: TrainerState, loss: float, fault: str, named: bool) -> StepEnd:
    """What is known of a step once it is updated, or left out for a fault."""
    train, means, step = parts.config.train, state.means, state.step + 1
    if fault:
        parts.interval.drop_step()
        say(f"step {step} is left out: {fault}")
        means = means if named else replace(means, left_out=means.left_out + 1)
    else:
        norm = parts.engine.grad_norm()
        parts.interval.add_step(norm)
        means = means.after(loss, float(norm), train.spike_window)
    if parts.batch_log:
        parts.batch_log.end_step(step)
    if parts.document_log:
        parts.document_log.add(step, parts.loader.take_documents(), fault)
    tokens = state.tokens + (0 if fault else batch_tokens_at(train, step))
    rewinds = bool(fault) and not named and train.on_spike == "rewind"
    parts.clock.end_step()
    return StepEnd(TrainerState(step, tokens, means), parts.loader.state(), rewinds)


# -- what happens between steps ---------------------------------------------------------------------------------------


def save(parts: Parts, state: TrainerState, data_state: Mapping[str, Any]) -> int:
    """Writes the checkpoint of this step, or has it written while training goes on; returns the step."""
    parts.interval.pause("saving")
    parts.saver.save(state, data_state, parts.loader.shard_list())
    parts.interval.run()
    return state.step


def wait_for_checkpoint(parts: Parts) -> None:
    """Returns when no checkpoint is in flight any more, before the run ends."""
    parts.interval.pause("saving")
    parts.saver.wait()


def rewind(parts: Parts, state: TrainerState, before: Counter[Path]) -> TrainerState:
    """Weights and optimizer as the newest checkpoint has them; the stream goes on, so all steps since are left out.

    `state` is that behind the last of them; `before` counts the times that a checkpoint was gone back to. Raises
    SpikeError where there is none, and where it does not help.
    """
    config, engine = parts.config, parts.engine
    parts.interval.pause("rewinding")
    parts.saver.wait("the weights are to be rewound to it")
    folder = from_rank_0(lambda: find_latest(config.run_dir))
    if folder is None:
        raise SpikeError(f"step {state.step} would be left out and the weights rewound, but there is no checkpoint yet")
    before[folder] += 1
    if before[folder] > MOST_IN_A_ROW:
        raise SpikeError(
            f"the weights were rewound to {folder} {MOST_IN_A_ROW} times, and step {state.step} is no better"
        )
    kept = trainer_state(folder)
    if kept.step < config.binarize.from_step <= state.step:
        raise SpikeError(f"{folder} is of full precision, and step {state.step} is not: it cannot be rewound to")
    agreed(lambda: resume.restore(engine, folder, config.optim.on_change))
    engine.shards.changed(state.step)
    parts.interval.restart()
    parts.interval.run()
    if parts.document_log:
        parts.document_log.rewound(state.step, kept.step)
    say(f"rewound to the weights of {folder}; steps {kept.step + 1} to {state.step} are left out")
    return TrainerState(state.step, kept.tokens, replace(kept.means, left_out=state.means.left_out))


def explained(error: UserError, config: Config, step: int) -> UserError:
    """What stopped the run in 1-based `step`, with what is left of it and what to do."""
    if not isinstance(error, SpikeError):
        return error
    latest = find_latest(config.run_dir)
    kept = f"The last good checkpoint is {latest}" if latest else "No checkpoint was written yet"
    return UserError(f"{error}. {kept}; {suspects(config, step)}, then start again")


def begin(parts: Parts, state: TrainerState) -> None:
    """What comes before the first step: its checkpoint where there is something to keep (what calibration found, or all
    that a run of no steps gives), and the first evaluation."""
    config = parts.config
    model = {"model/bits_per_weight": parts.bits_per_weight, "model/flops_per_token": parts.flops_per_token}
    parts.writer.scalars(0, 0, model)
    wanted = needs_calibration(config) or not config.train.total_steps
    if wanted and from_rank_0(lambda: find_latest(config.run_dir)) is None:
        save(parts, state, parts.loader.state())
    if config.eval.every:
        evaluate(parts, state)


def leave_marker(parts: Parts, state: TrainerState, stop: Stop) -> None:
    """FINISHED.json or STOPPED.json: launchers do not pass exit codes on faithfully."""
    config = parts.config
    done = state.step >= config.train.total_steps
    from_rank_0(lambda: write_finished(config, state) if done else write_stopped(config, state, stop.reason))
    if not done:
        say(f"stopped by {stop.reason} after step {state.step}; with train.resume=auto it goes on from there")
