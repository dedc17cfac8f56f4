"""Real launches in which a step is not to be trained on: it stops the run, or leaves no trace in the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launch.run_folders import copy_run

pytestmark = pytest.mark.launch
FAULTS = Path(__file__).with_name("faulty_pretrain.py")
SKIP = ("train.on_spike=skip", "train.spike_grad_norm=20", "train.spike_window=2", "debug.log_documents=true")
STAGES = [*(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3)), 1]


def documents(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.run_dir / "documents_rank00000.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("fault", "what", "step"),
    [
        ("nan_on_rank_1_at_step_3", "loss", 3),
        pytest.param("infinite_gradient_at_step_5", "gradient norm", 5, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_number_that_is_not_finite_stops_all_ranks_and_the_good_weights_are_saved(
    launch: Any, fault: str, what: str, step: int, stage: int
) -> None:
    name, options = f"{fault}-{stage}", (f"engine.zero_stage={stage}", "checkpoint.every=100")
    run = launch(name, *options, script=FAULTS, env={"FAULT": fault}, expect=1)
    assert run.output.count(f"the {what} of step {step} is not finite; stopped before the update") == 1
    assert f"The last good checkpoint is {run.run_dir}/checkpoints/step_{step - 1:08d}; lower optim.lr" in run.output
    assert "Traceback (most recent call last)" not in run.output
    assert [path.name for path in (run.run_dir / "checkpoints").iterdir()] == [f"step_{step - 1:08d}"]
    again = launch(name, *options)
    assert again.losses.keys() == {1, 2, 3, 4, 5, 6}


@pytest.mark.parametrize("stage", STAGES)
def test_a_spike_leaves_no_trace_but_its_step(launch: Any, stage: int) -> None:
    """As if its step had been named beforehand; and a run that is resumed behind it, or before it, is the same."""
    options = (f"engine.zero_stage={stage}", "checkpoint.every=1", "checkpoint.keep=0")
    named = launch(f"named-{stage}", *options, "data.skip_steps=[4]")
    assert named.losses.keys() == {1, 2, 3, 5, 6}
    faulty = {"script": FAULTS, "env": {"FAULT": "large_gradient_at_step_4"}}
    run = launch(f"skipped-{stage}", *options, *SKIP, **faulty)
    assert "step 4 is left out: the gradient norm of step 4 is" in run.output
    assert run.losses == named.losses
    assert run.metrics[-1]["tokens"] == 5 * 192
    assert [line["step"] for line in documents(run) if "left_out" in line] == [4]
    for step in (3, 4) if stage == 1 else (4,):
        copy_run(run.run_dir, launch.runs / f"resumed-{stage}-{step}", step=step)
        again = launch(f"resumed-{stage}-{step}", *options, *SKIP, **faulty)
        assert again.losses == run.losses
        saved = [r.run_dir / "checkpoints" / "step_00000006" / "trainer.json" for r in (run, again)]
        assert saved[0].read_text() == saved[1].read_text()


def test_rewinding_leaves_out_all_steps_since_the_checkpoint(launch: Any) -> None:
    named = launch("named-two", "data.skip_steps=[4, 5]")
    options = ("train.on_spike=rewind", "debug.log_documents=true")
    faulty = {"script": FAULTS, "env": {"FAULT": "infinite_gradient_at_step_5"}}
    run = launch("rewound", *options, **faulty)
    assert "the gradient norm of step 5 is not finite" in run.output
    assert "step_00000003; steps 4 to 5 are left out" in run.output
    assert run.losses[6] == named.losses[6]
    assert [line["rewound_to"] for line in documents(run) if "rewound_to" in line] == [3]
    copy_run(run.run_dir, launch.runs / "rewound-again", step=3)
    assert launch("rewound-again", *options, **faulty).losses[6] == named.losses[6]


@pytest.mark.slow
def test_nothing_to_rewind_to(launch: Any) -> None:
    options = ("train.on_spike=rewind", "checkpoint.every=100")
    run = launch("early", *options, script=FAULTS, env={"FAULT": "infinite_gradient_at_step_5"}, expect=1)
    assert "there is no checkpoint yet" in run.output
    assert (run.run_dir / "checkpoints" / "step_00000004" / "COMPLETE.json").is_file()
