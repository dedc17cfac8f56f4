"""Studies that tune: grids, variants tuned from others, teachers, the order of runs, plots, results kept as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fbitrain.base.errors import UserError
from fbitrain.commands import compare
from fbitrain.studies.plots import curves_of, draw, gaps_of
from fbitrain.studies.results import Outcome, outcomes, read_results, verdicts, write_results
from fbitrain.studies.runs import Run, begin, config_of, end, overrides, runs, waits_for
from fbitrain.studies.study_file import Study, load_study
from fbitrain.studies.table import table

BASE = """
model: {vocab_size: 300, n_layers: 1, n_heads: 2, d_model: 8, d_ff: 16, max_seq_len: 64}
data: {sources: [{name: a, paths: [a.jsonl]}], tokenizer: tok, seq_len: 64}
distill: {kd_weight: 0, ce_weight: 1}
optim: {warmup_steps: 0, min_lr: 0}
"""
TEXT = """
base: BASE
seeds: [0]
sets: {twin: [binarize.enabled=false], long: [train.total_steps=7, optim.eps=1e-9]}
grids: {adamw: {optim.lr: [0.1, 0.2, 0.4], optim.min_lr: [0.01, 0.02, 0.04]}}
variants:
  - {name: tuning, grid: adamw}
  - {name: twin, set: [$twin, train.total_steps=5]}
  - {name: final, set: [$long], tuned_from: tuning, seeds: [0, 1]}
  - {name: student, set: [distill.kd_weight=1], teacher: twin}
expect:
  - [final, tuning]
plots:
  all sizes: {reference: twin, groups: {twin: [twin], binary: [tuning, final], student: [student]}}
"""
WEIGHTS = 4 * 8 * 8 + 3 * 8 * 16


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "study.yaml").write_text(TEXT.replace("BASE", str(tmp_path / "base.yaml")))
    return load_study(tmp_path / "study.yaml")


def leave(study: Study, run: Run, figure: float) -> None:
    """What a run that came to `figure` bits per byte leaves; NaN: it failed."""
    run.folder.mkdir(parents=True, exist_ok=True)
    begin(study, run)
    if math.isnan(figure):
        end(run, 60.0, failed=True)
        return
    start = {"step": 0, "tokens": 0, "model/bits_per_weight": 1.5, "model/flops_per_token": 1e10}
    last = {"step": 5, "tokens": 640, "heldout/perplexity": 4 * figure, "heldout/bits_per_byte": figure}
    (run.folder / "metrics.jsonl").write_text(f"{json.dumps(start)}\n{json.dumps(last)}\n")
    end(run, 60.0)
    (run.folder / "FINISHED.json").write_text("{}")


def tune(study: Study, folder: Path, figures: Sequence[float]) -> None:
    for run, figure in zip(runs(study, folder)[:3], figures, strict=True):
        leave(study, run, figure)


def test_a_grid_is_a_run_per_value_and_its_keys_go_along(study: Study, tmp_path: Path) -> None:
    all_runs = runs(study, tmp_path)
    names = [run.folder.name for run in all_runs]
    assert names[:3] == ["tuning-0.1-seed0", "tuning-0.2-seed0", "tuning-0.4-seed0"]
    assert names[3:] == ["twin-seed0", "final-seed0", "student-seed0", "final-seed1"]
    config = config_of(study, all_runs[1])
    assert (config.optim.lr, config.optim.min_lr) == (0.2, 0.02)


def test_sets_stand_for_their_overrides_in_their_place(study: Study, tmp_path: Path) -> None:
    assert study.variant("twin").overrides == ("binarize.enabled=false", "train.total_steps=5")
    assert study.variant("final").overrides == ("train.total_steps=7", "optim.eps=1e-9")


def test_the_best_value_is_shown_with_all_others_and_an_edge_is_named(study: Study, tmp_path: Path) -> None:
    tune(study, tmp_path, [2.5, 2.25, 2.75])
    (tuned,) = outcomes(study, tmp_path)
    assert (tuned.setting, tuned.bits_per_byte, tuned.at_edge) == ("0.2", (2.25,), False)
    text = table(study, [tuned])
    assert f"| tuning | 2.250 | 2.250 | 9.00 | 1.50 | 640 | {640 / WEIGHTS:.1f} | 1.0 | 6.4 |" in text
    assert "| tuning | optim.lr | 0.1: 2.500, 0.2: **2.250**, 0.4: 2.750 | 0.2 |" in text


def test_a_failed_value_is_said_to_have_failed_and_one_that_did_not_run_not_to_have_run(
    study: Study, tmp_path: Path
) -> None:
    for run, figure in zip(runs(study, tmp_path)[:2], [math.nan, 2.25], strict=True):
        leave(study, run, figure)
    row = "| tuning | optim.lr | 0.1: failed, 0.2: **2.250**, 0.4: not run | 0.2 |"
    assert row in table(study, outcomes(study, tmp_path))
    leave(study, runs(study, tmp_path)[2], 2.0)
    assert "| 0.4 (an edge of the grid) |" in table(study, outcomes(study, tmp_path))


def test_a_value_is_chosen_by_the_median_of_its_seeds(study: Study, tmp_path: Path) -> None:
    tuning = replace(study.variant("tuning"), seeds=(0, 1, 2))
    study = replace(study, variants=(tuning,), expected=(), plots=())
    by_value = {"0.1": (2.0, 2.0, 2.0), "0.2": (1.0, 2.1, 2.2), "0.4": (1.5, 1.9, math.inf)}
    for run in runs(study, tmp_path):
        assert run.setting
        leave(study, run, by_value[run.setting.name][run.seed])
    (tuned,) = outcomes(study, tmp_path)
    assert (tuned.setting, tuned.seeds, tuned.bits_per_byte) == ("0.4", (0, 1, 2), (1.5, 1.9, math.inf))
    assert tuned.median == 1.9


def test_a_tuned_variant_waits_for_the_grid_and_takes_its_best_value(study: Study, tmp_path: Path) -> None:
    final = runs(study, tmp_path)[4]
    with pytest.raises(UserError, match="final-seed0 is tuned from 'tuning', of which no run is finished"):
        overrides(study, final)
    assert [run.folder.name for run in waits_for(study, final)] == [f"tuning-{lr}-seed0" for lr in (0.1, 0.2, 0.4)]
    tune(study, tmp_path, [2.5, 2.25, math.nan])
    assert waits_for(study, final) == []
    assert waits_for(study, final, pending=runs(study, tmp_path)[2:3]) == runs(study, tmp_path)[2:3]  # tried again
    config = config_of(study, final)
    assert (config.optim.lr, config.optim.min_lr, config.train.total_steps) == (0.2, 0.02, 7)


def test_a_tuned_run_is_refused_once_another_value_is_best(study: Study, tmp_path: Path) -> None:
    tune(study, tmp_path, [2.5, 2.25, math.nan])
    leave(study, runs(study, tmp_path)[4], 2.0)
    assert [verdict for *_, verdict in verdicts(study, outcomes(study, tmp_path))] == ["holds (one run each)"]
    leave(study, runs(study, tmp_path)[2], 2.1)
    with pytest.raises(UserError, match="final-seed0 has other settings than the study now"):
        outcomes(study, tmp_path)


def test_nothing_is_tuned_from_a_grid_that_failed_as_a_whole(study: Study, tmp_path: Path) -> None:
    tune(study, tmp_path, [math.nan] * 3)
    assert len(waits_for(study, runs(study, tmp_path)[4])) == 3


def test_a_student_learns_from_the_release_of_its_teachers_run(study: Study, tmp_path: Path) -> None:
    twin, student = runs(study, tmp_path)[3], runs(study, tmp_path)[5]
    assert waits_for(study, student) == [twin]
    assert config_of(study, student).distill.teacher == str(tmp_path / "twin-seed0/release/dense")
    leave(study, twin, 2.0)
    assert waits_for(study, student) == []


class FakeCommands:
    """Stands for the commands of launch/: a run comes to its learning rate, and fails where that is in `failing`."""

    def __init__(self, study: Study, failing: Sequence[float] = ()) -> None:
        self.study, self.failing = study, failing
        self.called: list[str] = []

    def __call__(self, run: Run, command: Sequence[str], jobs: int) -> int:
        self.called.append(f"{command[0]} {run.folder.name}")
        if command[0] == "release":
            (run.release / "dense").mkdir(parents=True)
            (run.release / "dense/config.json").write_text("{}")
            return 0
        assert command[1] == self.study.base
        lr = config_of(self.study, run).optim.lr
        if lr in self.failing:
            return 1
        leave(self.study, run, lr)
        (run.folder / "checkpoints").mkdir()
        return 0


def run_all(
    study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: Sequence[float] = (), jobs: int = 1
) -> tuple[list[str], list[str]]:
    """The commands that were called, and what failed."""
    commands = FakeCommands(study, failing)
    monkeypatch.setattr(compare, "call", commands)
    todo = [run for run in runs(study, folder) if not (run.folder / "FINISHED.json").is_file()]
    return commands.called, compare.train_all(study, todo, jobs, discard=True)


@pytest.mark.parametrize("jobs", [1, 3])
def test_runs_come_after_those_that_they_wait_for(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    study = replace(study, variants=(*study.variants[2:], *study.variants[:2]))  # the later ones first
    called, failed = run_all(study, tmp_path, monkeypatch, jobs=jobs)
    assert not failed
    order = {name: i for i, name in enumerate(called)}
    assert len(order) == len(called) == 8
    assert order["pretrain final-seed0"] > max(order[f"pretrain tuning-{lr}-seed0"] for lr in (0.1, 0.2, 0.4))
    assert order["pretrain twin-seed0"] < order["release twin-seed0"] < order["pretrain student-seed0"]
    assert not list(tmp_path.glob("*/checkpoints"))
    assert run_all(study, tmp_path, monkeypatch) == ([], [])


def test_a_run_that_fails_stops_only_those_that_need_it(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, failed = run_all(study, tmp_path, monkeypatch, failing=[0.1, 3e-4])  # the twin has the default of 3e-4
    assert "pretrain final-seed1" in called
    assert [line.split(",")[0] for line in failed] == [
        "tuning-0.1-seed0 failed with exit code 1",
        "twin-seed0 failed with exit code 1",
        "student-seed0 was not run",
    ]
    assert failed[2].endswith("these are not finished: twin-seed0")
    called, failed = run_all(study, tmp_path, monkeypatch)  # again, and what failed is tried again
    assert not [line for line in failed if "twin" in line or "student" in line]


def test_a_pretrained_model_is_fine_tuned(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size")
    shape = {**dict(zip(names, (300, 1, 2, 8, 16), strict=True)), "max_position_embeddings": 64}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(shape))
    variant = replace(study.variant("twin"), overrides=(f"model.pretrained={tmp_path / 'hf'}",))
    study = replace(study, variants=(variant,), expected=(), plots=())
    called, failed = run_all(study, tmp_path / "runs", monkeypatch)
    assert (called, failed) == (["finetune twin-seed0"], [])
    assert outcomes(study, tmp_path / "runs")[0].weights == 0


def outcome(name: str, tokens: int, *figures: float) -> Outcome:
    return Outcome(name, tuple(range(len(figures))), figures, figures, 1.0, tokens, 10, 1.0, 60.0)


def test_curves_go_by_tokens_and_gaps_compare_equal_tokens(study: Study, tmp_path: Path) -> None:
    (plot,) = study.plots
    results = [outcome("twin", 500, 2.0, 2.5, 2.0), outcome("final", 500, 3.0, 2.75), outcome("tuning", 100, 4.0)]
    curves = curves_of(plot, [*results, outcome("student", 500, math.nan)])
    assert [(point.tokens, point.middle, point.low, point.high) for point in curves["binary"]] == [
        (100, 4.0, 4.0, 4.0),
        (500, 2.875, 2.75, 3.0),
    ]
    assert list(curves) == ["twin", "binary"]
    ((group, (point,)),) = gaps_of(plot, curves).items()
    assert (group, point.tokens) == ("binary", 500)
    assert (point.middle, point.low, point.high) == pytest.approx((43.75, 10.0, 50.0))
    names = [path.name for path in draw(study, results, tmp_path)]
    assert names == ["bits_per_byte.png", "all-sizes.png", "all-sizes_gap.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert [path.name for path in draw(study, results[1:], tmp_path)] == names[:2]  # without the reference


def test_results_come_back_as_they_were(study: Study, tmp_path: Path) -> None:
    tune(study, tmp_path / "runs", [2.5, math.nan, 2.0])
    leave(study, runs(study, tmp_path / "runs")[4], 2.25)
    results = outcomes(study, tmp_path / "runs")
    write_results(study, results, tmp_path / "results.json")
    assert read_results(study, tmp_path / "results.json") == results
    untimed = [replace(results[0], seconds=math.nan, flops=math.nan, bits_per_byte=(math.nan,)), results[1]]
    write_results(study, untimed[::-1], tmp_path / "results.json")
    again = read_results(study, tmp_path / "results.json")  # in the study's order
    assert table(study, again) == table(study, untimed)
    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # no NaN in it
    with pytest.raises(UserError, match="variants that the study has not: final"):
        read_results(replace(study, variants=study.variants[:1]), tmp_path / "results.json")
    (tmp_path / "results.json").write_text('{"outcomes": [{}]}')
    with pytest.raises(UserError, match=r"results\.json cannot be read: KeyError"):
        read_results(study, tmp_path / "results.json")


def test_a_table_is_drawn_again_without_the_runs(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs/study"
    tune(study, folder, [2.5, 2.25, 2.75])
    start, kept = [str(tmp_path / "study.yaml"), "--table"], str(tmp_path / "kept.json")
    assert compare.main(compare.parser().parse_args([*start, "--runs", str(tmp_path / "runs"), "--results", kept])) == 0
    first = capsys.readouterr().out
    assert compare.main(compare.parser().parse_args([*start, "--runs", str(tmp_path / "new"), "--from", kept])) == 0
    assert capsys.readouterr().out == first.replace(str(tmp_path / "runs"), str(tmp_path / "new"))
    assert (tmp_path / "new/study/table.md").read_text() == (folder / "table.md").read_text()
    assert (tmp_path / "new/study/all-sizes.png").is_file()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("grid: adamw}", "grid: sgd}", "'tuning' has grid: sgd, but grids: has no sgd"),
        ("grid: adamw}", "grid: {optim.lr: 3}}", "grid: of variant 'tuning' is not section.key: .values."),
        ("grid: adamw}", "grid: {}}", "grid: of variant 'tuning' is not section.key: .values."),
        ("[0.01, 0.02, 0.04]", "[0.01, 0.02]", "grids: 'adamw' has lists of different lengths"),
        ("[0.1, 0.2, 0.4]", "[0.1, 0.2, 0.1]", "grids: 'adamw' has a value twice"),
        ("[$long]", "[$short]", r"'final' has \$short, but sets: has no short"),
        ("twin: [binarize", "twin: binarize.x, y: [binarize", "sets: 'twin' is not a list"),
        ("grids: {", "grids: [3]\ngrid: {", "grids: has no names"),
        ("tuned_from: tuning", "tuned_from: student", "tuned_from: of variant 'final' is 'student', and no variant"),
        ("tuned_from: tuning", "tuned_from: twin", "'final' is tuned from 'twin', which has no grid"),
        ("tuned_from: tuning", "tuned_from: tuning, grid: adamw", "'final' has both grid: and tuned_from:"),
        ("teacher: twin", "teacher: tuning", "the teacher of variant 'student' has a grid:"),
        ("reference: twin", "reference: two", "the reference 'two' of 'all sizes' is none of its groups"),
        ("student: [student]", "student: [pupil]", "'student' names 'pupil', and no variant is called so"),
        ("student: [student]", "student: student", "'all sizes' is not groups:"),
    ],
)
def test_a_wrong_study_is_refused_with_a_reason(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    assert old in TEXT
    (tmp_path / "wrong.yaml").write_text(TEXT.replace(old, new, 1))
    with pytest.raises(UserError, match=complaint):
        load_study(tmp_path / "wrong.yaml")
