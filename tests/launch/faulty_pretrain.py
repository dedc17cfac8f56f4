"""launch/pretrain.py, or launch/$COMMAND.py, with one fault built in, named by $FAULT; started like the real one."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from fbitrain import build, checkpoint, fine_tune, train
from fbitrain.commands.verbs import leave

RANK = int(os.environ["RANK"])


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step_4() -> None:
    step = train.train_step

    def dying(parts: Any, state: Any, stop: Any) -> Any:
        if state.step == 3 and RANK == 1:
            die()
        return step(parts, state, stop)

    train.train_step = dying  # type: ignore[assignment]


def kill_in_second_save() -> None:
    """Every rank has written its shard, and then the power goes, before the marker is there."""
    finish = checkpoint._finish

    def dying(folder: Any, final: Any, *rest: Any) -> None:
        if final.name != "step_00000002":
            die()
        finish(folder, final, *rest)

    checkpoint._finish = dying  # type: ignore[assignment]


def nan_on_rank_1_at_step_3() -> None:
    agree = train.agree_to_go_on

    def poisoned(parts: Any, state: Any, stop: Any, finite: Any, failure: str) -> None:
        if state.step == 2 and RANK == 1:
            finite = finite & False
        agree(parts, state, stop, finite, failure)

    train.agree_to_go_on = poisoned


def freeze(chosen: Callable[[str], bool]) -> None:
    model = build.build_model

    def frozen(*arguments: Any) -> Any:
        lm, report = model(*arguments)
        for name, parameter in lm.named_parameters():
            if chosen(name):
                parameter.requires_grad_(False)
        return lm, report

    build.build_model = frozen  # type: ignore[assignment]


def freeze_embeddings() -> None:
    """Not a fault, but what no configuration asks for: parameters that are not trained."""
    freeze(lambda name: "embed_tokens" in name)


def freeze_matrices() -> None:
    freeze(lambda name: name.endswith("_proj.weight"))


def without_calibration() -> None:
    """Whoever reads calibration text, chooses salient weights or solves layers dies of it."""
    for module, names in ((build, ("calibration_ids",)), (fine_tune, ("select_masks", "quantize_"))):
        for name in names:
            getattr(module, name)  # a name that is gone would make this no fault at all
            setattr(module, name, die)


globals()[os.environ["FAULT"]]()
leave([os.environ.get("COMMAND", "pretrain"), *sys.argv[1:]])
