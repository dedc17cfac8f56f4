"""launch/pretrain.py, or launch/$COMMAND.py, with one fault built in, named by $FAULT; started like the real one."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from fbitrain import build, checkpoint, checkpoint_snapshot, fine_tune, train
from fbitrain.base.optional_writes import JsonLines
from fbitrain.commands.verbs import leave
from fbitrain.engine import Engine
from fbitrain.tensorboard_page import TensorBoardPage

RANK = int(os.environ["RANK"])


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_step_4(act: Callable[[], object]) -> None:
    before_step(4, act, when_saved=True)


def before_step(number: int, act: Callable[[], object], *, when_saved: bool = False) -> None:
    step = train.train_step

    def acting(parts: Any, state: Any, stop: Any) -> Any:
        if state.step == number - 1:
            if when_saved:
                parts.saver.wait()  # so that the checkpoint of the step before is there
            act()
        return step(parts, state, stop)

    train.train_step = acting  # type: ignore[assignment]


def kill_at_step_4() -> None:
    before_step_4(lambda: die() if RANK == 1 else None)


def kill_rank_0_at_step_4() -> None:
    before_step_4(lambda: die() if RANK == 0 else None)


def hang_while_rank_1_dies() -> None:
    """As inside NCCL, where a rank that waits for a lost one hears of nothing."""
    before_step_4(lambda: die() if RANK == 1 else time.sleep(600))


def hang_in_data_on_rank_1() -> None:
    """In step 4, as on a file system that does not answer: nobody ever writes into the pipe that is opened."""
    draw = train.draw
    step = 0

    def hanging(parts: Any, **options: Any) -> Any:
        if RANK == 1 and step == 3:
            pipe = parts.config.run_dir / "pipe"
            os.mkfifo(pipe)
            open(pipe).close()
        return draw(parts, **options)

    def note() -> None:
        nonlocal step
        step = 3

    before_step_4(note)
    train.draw = hanging


def stop_rank_1_at_step_4() -> None:
    before_step_4(lambda: os.kill(os.getpid(), signal.SIGSTOP) if RANK == 1 else None)


def slow_forward_on_rank_1() -> None:
    forward = Engine.__call__

    def slow(engine: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.3 if RANK == 1 else 0)
        return forward(engine, *arguments, **options)

    Engine.__call__ = slow  # type: ignore[method-assign]


def slow_micro_batches_in_step_4() -> None:
    """Step 4 takes half a minute, and says when it has begun."""

    def slow() -> None:
        backward = Engine.backward

        def waiting(engine: Any, loss: Any) -> None:
            print("step 4 has begun", flush=True)
            time.sleep(8)
            backward(engine, loss)

        Engine.backward = waiting  # type: ignore[method-assign]

    before_step_4(slow)


def no_flock() -> None:
    """As on a network disk that is mounted without."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    fcntl.flock = refuse


def full_disk_in_steps_2_to_4() -> None:
    """For metrics, batch logs and TensorBoard's events; not for checkpoints."""
    write, scalars, step = JsonLines._write, TensorBoardPage.scalars, train.train_step
    full = False

    def stepping(parts: Any, state: Any, stop: Any) -> Any:
        nonlocal full
        full = 1 <= state.step <= 3
        return step(parts, state, stop)

    def refuse(work: Callable[..., None]) -> Callable[..., None]:
        def refused(*arguments: Any) -> None:
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            work(*arguments)

        return refused

    JsonLines._write = refuse(write)  # type: ignore[method-assign]
    TensorBoardPage.scalars = refuse(scalars)  # type: ignore[method-assign]
    train.train_step = stepping  # type: ignore[assignment]


def faulty_writer() -> None:
    """The fault is the writer's, and $WRITER_FAULT names it."""
    from faulty_writer import COMMAND  # which lies beside this script

    checkpoint_snapshot.COMMAND = COMMAND


def kill_in_the_middle_of_an_asynchronous_write() -> None:
    """A writer hangs in the second checkpoint, that of step 4; the ranks train on, and rank 1 is killed."""
    faulty_writer()
    before_step(6, lambda: die() if RANK == 1 else None)


def kill_in_second_synchronous_save() -> None:
    """Every rank has written its shard, and then the power goes, before the marker is there."""
    commit = checkpoint.commit_folder

    def dying(folder: Any, commit_: Any, *rest: Any) -> None:
        if commit_.final.name != "step_00000002":
            die()
        commit(folder, commit_, *rest)

    checkpoint.commit_folder = dying


def nan_on_rank_1_at_step_3() -> None:
    agree, calls = train.agree_to_go_on, itertools.count(1)

    def poisoned(parts: Any, stop: Any, loss: Any, failure: str) -> float:
        bad = next(calls) == 3 and RANK == 1
        return agree(parts, stop, loss * float("nan") if bad else loss, failure)

    train.agree_to_go_on = poisoned


def scaled_gradient(at: int, factor: float) -> None:
    """In step `at` and no other."""
    step, backward = train.train_step, Engine.backward
    going_on = 0

    def stepping(parts: Any, state: Any, stop: Any) -> Any:
        nonlocal going_on
        going_on = state.step + 1
        return step(parts, state, stop)

    def scaling(engine: Any, loss: Any) -> None:
        backward(engine, loss * (factor if going_on == at else 1.0))

    train.train_step = stepping
    Engine.backward = scaling  # type: ignore[method-assign]


def large_gradient_at_step_4() -> None:
    scaled_gradient(4, 1000.0)


def infinite_gradient_at_step_5() -> None:
    scaled_gradient(5, float("inf"))


def freeze_matrices() -> None:
    """What no configuration asks for."""
    model = build.build_model

    def frozen(*arguments: Any) -> Any:
        lm, report = model(*arguments)
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(not name.endswith("_proj.weight"))
        return lm, report

    build.build_model = frozen  # type: ignore[assignment]


def without_calibration() -> None:
    """Whoever reads calibration text, chooses salient weights or solves layers dies of it."""
    for module, names in ((build, ("calibration_ids",)), (fine_tune, ("select_masks", "quantize_"))):
        for name in names:
            getattr(module, name)  # a name that is gone would make this no fault at all
            setattr(module, name, die)


globals()[os.environ["FAULT"]]()
leave([os.environ.get("COMMAND", "pretrain"), *sys.argv[1:]])
