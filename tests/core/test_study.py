"""A study: what a file may say, which runs it is, what their metrics make of the expected orderings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from fbitrain.base.errors import UserError
from fbitrain.commands import compare
from fbitrain.studies.results import outcomes, verdicts
from fbitrain.studies.runs import begin, config_of, end, overrides, runs
from fbitrain.studies.study_file import Study, load_study, slug
from fbitrain.studies.table import table

ROOT = Path(__file__).parents[2]
TEXT = """
base: BASE
seeds: [0, 1]
variants:
  - name: OneBit
    set: [binarize.method=onebit]
  - name: MoS, 4 experts
    set: [binarize.method=mixture_of_scales, binarize.n_experts=4]
  - name: full precision
    set: [binarize.enabled=false]
    seeds: [0]
expect:
  - ["MoS, 4 experts", OneBit]
  - [full precision, "MoS, 4 experts"]
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    path = tmp_path / "small.yaml"
    base = tmp_path / "base.yaml"
    base.write_text(
        "model: {vocab_size: 300}\ndata: {sources: [{name: a, paths: [a.jsonl]}], tokenizer: tok}\n"
        "distill: {kd_weight: 0, ce_weight: 1}\noptim: {warmup_steps: 0}\n"
    )
    path.write_text(TEXT.replace("BASE", str(base)))
    return load_study(path)


def finish(study: Study, folder: Path, figures: Sequence[float]) -> None:
    """Writes what the runs would have left, in the order of `runs`; negative: not finished."""
    for run, value in zip(runs(study, folder), figures, strict=True):
        run.folder.mkdir(parents=True)
        lines = [
            {"step": 0, "tokens": 0, "model/bits_per_weight": 1.5, "model/flops_per_token": 1e11},
            {"step": 0, "tokens": 0, "heldout/perplexity": 1e9, "heldout/bits_per_byte": 9.0},
            {"step": 2, "tokens": 512, "heldout/perplexity": 10 * value, "heldout/bits_per_byte": value},
        ]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for seconds in (60.0, 30.0):
            begin(study, run)
            end(run, seconds)
        if value >= 0:
            (run.folder / "FINISHED.json").write_text("{}")


def test_runs_of_all_variants_come_with_their_first_seed_first(study: Study, tmp_path: Path) -> None:
    names = " ".join(run.folder.name for run in runs(study, tmp_path))
    assert names == "onebit-seed0 mos-4-experts-seed0 full-precision-seed0 onebit-seed1 mos-4-experts-seed1"
    run = runs(study, tmp_path)[3]
    method, *rest = overrides(study, run)
    assert method == "binarize.method=onebit"
    assert set(rest) == {
        f"run.dir={tmp_path}",
        "run.name=onebit-seed1",
        "train.seed=1",
        "data.seed=1",
    }


def test_an_ordering_holds_only_beyond_the_seeds(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [30.0, 20.0, 25.0, 32.0, 22.0])
    found = {(low, high): verdict for low, high, verdict in verdicts(study, outcomes(study, tmp_path))}
    assert found == {
        ("MoS, 4 experts", "OneBit"): "holds",
        ("full precision", "MoS, 4 experts"): "does not hold (one run against several)",
    }


def test_overlapping_seeds_are_noise_and_unfinished_variants_are_left_out(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [30.0, 20.0, -1.0, 21.0, 29.0])
    results = outcomes(study, tmp_path)
    assert [outcome.name for outcome in results] == ["OneBit", "MoS, 4 experts"]
    assert [verdict for *_, verdict in verdicts(study, results)] == ["undecided", "not run"]
    # 14 layers of 12 have 12·(4·768² + 3·768·2048) binary weights, more than the tokens by far.
    row = "| OneBit | 30.000, 21.000 | 25.500 | 300.00, 210.00 | 1.50 | 512 | 0.0 | 1.5 | 51.2 |"
    assert row in table(study, results)


def test_a_variant_counts_by_the_seeds_that_are_finished(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [30.0, 20.0, 15.0, 31.0, -1.0])
    results = outcomes(study, tmp_path)
    assert [outcome.bits_per_byte for outcome in results] == [(30.0, 31.0), (20.0,), (15.0,)]
    assert [verdict for *_, verdict in verdicts(study, results)] == [
        "holds (one run against several)",
        "holds (one run each)",
    ]


def test_a_run_that_diverged_is_above_all_others_and_one_run_is_said_to_be_one(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [math.inf, 20.0, 15.0, math.inf, 22.0])
    found = [verdict for *_, verdict in verdicts(study, outcomes(study, tmp_path))]
    assert found == ["holds", "holds (one run against several)"]
    single = replace(study, expected=(("full precision", "full precision"),))
    assert [verdict for *_, verdict in verdicts(single, outcomes(single, tmp_path))] == ["undecided"]
    few = replace(study, variants=tuple(replace(variant, seeds=(0,)) for variant in study.variants))
    assert {verdict for *_, verdict in verdicts(few, outcomes(few, tmp_path))} == {"holds (one run each)"}


def test_a_run_from_before_a_field_was_added_has_its_default(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [1.0] * 5)
    noted = runs(study, tmp_path)[0].folder / "study.json"
    content = json.loads(noted.read_text())
    with_field, content["config"] = content["config"], content["config"].replace("    ns_steps: 5\n", "")
    assert content["config"] != with_field
    noted.write_text(json.dumps(content))
    assert outcomes(study, tmp_path)
    content["config"] = content["config"].replace("total_steps: ", "total_steps: 1")
    noted.write_text(json.dumps(content))
    with pytest.raises(UserError, match="other settings than the study now"):
        outcomes(study, tmp_path)


def test_a_run_noted_before_its_tokenizer_was_looked_up_is_the_same_run(study: Study, tmp_path: Path) -> None:
    base = Path(study.base)
    base.write_text(base.read_text().replace(", tokenizer: tok", "").replace("{kd_weight", "{teacher: t, kd_weight"))
    finish(study, tmp_path, [1.0] * 5)
    noted = runs(study, tmp_path)[0].folder / "study.json"
    content = json.loads(noted.read_text())
    assert "  tokenizer: t\n" in content["config"]
    content["config"] = content["config"].replace("  tokenizer: t\n", "  tokenizer: teacher\n")
    noted.write_text(json.dumps(content))
    assert outcomes(study, tmp_path)


def test_a_run_with_other_settings_than_the_study_has_now_is_refused(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [1.0] * 5)
    changed = replace(study, variants=(replace(study.variants[0], overrides=("binarize.method=xnor",)),))
    with pytest.raises(UserError, match=r"onebit-seed0 has other settings than the study now"):
        outcomes(changed, tmp_path)
    assert "onebit-seed0 has other settings" in compare.train(changed, runs(changed, tmp_path)[0], 1, discard=False)


def test_a_run_is_timed_only_if_all_its_attempts_were(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [1.0] * 5)
    row = "| full precision | 1.000 | 1.000 | 10.00 | 1.50 | 512 | 0.0 | {} | 51.2 |"
    assert row.format("1.5") in table(study, outcomes(study, tmp_path))
    run = runs(study, tmp_path)[2]
    (run.folder / "FINISHED.json").unlink()
    begin(study, run)  # compare.py was killed here, and the run went on
    begin(study, run)
    end(run, 1.0)
    (run.folder / "FINISHED.json").write_text("{}")
    assert row.format("not timed") in table(study, outcomes(study, tmp_path))
    (run.folder / "study.json").unlink()  # run by hand
    assert row.format("not timed") in table(study, outcomes(study, tmp_path))


def test_a_run_without_heldout_figures_says_what_to_set(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [1.0] * 5)
    metrics = runs(study, tmp_path)[0].folder / "metrics.jsonl"
    metrics.write_text('{"step": 0, "tokens": 0, "model/bits_per_weight": 1}\n')
    with pytest.raises(UserError, match=r"onebit-seed0 has no heldout/bits_per_byte .* set data\.heldout"):
        outcomes(study, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("base: BASE", "basis: BASE", "must have base"),
        ("name: OneBit", "title: OneBit", "variants.0. has no name"),
        ("name: OneBit", "name: mos 4 EXPERTS", "two variants are called 'MoS, 4 experts'"),
        ("seeds: [0, 1]", "seeds: []", "'OneBit' has no list of seeds"),
        ("seeds: [0, 1]", "seeds: 3", "'OneBit' has no list of seeds"),
        ("set: [binarize.method=onebit]", "set: binarize.method=onebit", "set: of variant 'OneBit' is not a list"),
        ("expect:", "expect: 7\nexpected:", "7 is not a pair"),
        ('- ["MoS, 4 experts", OneBit]', "- [TwoBit, OneBit]", "no variant is called 'TwoBit'"),
        ("expect:", "expects:", "unknown keys expects"),
        ("set: [binarize.enabled=false]", "sets: []", "'full precision' has unknown keys sets"),
        ("base: BASE", "base: [", "cannot be read"),
    ],
)
def test_a_wrong_study_is_refused_with_a_reason(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(UserError, match=complaint):
        load_study(path)


def test_names_become_folders() -> None:
    assert slug("PB-LLM 10 %, Hessian (r=0.1)") == "pb-llm-10-hessian-r-0.1"


@pytest.mark.parametrize("name", ["smollm2", "recipes"])
def test_every_variant_of_a_shipped_study_is_a_configuration_that_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(ROOT / f"launch/studies/{name}.yaml")
    for run in runs(study, Path("runs")):
        if name := run.variant.tuned_from:  # nothing of it is finished; the first value stands for the best
            untied = replace(run.variant, tuned_from="")
            run = replace(run, variant=untied, setting=study.variant(name).grid[0])
        config_of(study, run)
