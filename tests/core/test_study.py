"""A study: what a file may say, which runs it is, what their metrics make of the expected orderings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fbitrain.config import load_config
from fbitrain.errors import UserError
from fbitrain.launch import compare
from fbitrain.study import Study, load_study, outcomes, runs, slug, verdicts

ROOT = Path(__file__).parents[2]
TEXT = """
base: base.yaml
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
    path.write_text(TEXT)
    return load_study(path)


def finish(study: Study, folder: Path, perplexities: Sequence[float]) -> None:
    """Writes what the runs would have left, in the order of `runs`; NaN: not finished."""
    for run, value in zip(runs(study, folder), perplexities, strict=True):
        run.folder.mkdir(parents=True)
        lines = [
            {"step": 0, "tokens": 0, "model/bits_per_weight": 1.5},
            {"step": 0, "tokens": 0, "heldout/perplexity": 1e9},
            {"step": 2, "tokens": 512, "heldout/perplexity": value},
        ]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run.folder / "study.json").write_text('{"seconds": 90.0}')
        if value == value:
            (run.folder / "FINISHED.json").write_text("{}")


def test_runs_of_all_variants_come_with_their_first_seed_first(study: Study, tmp_path: Path) -> None:
    names = " ".join(run.folder.name for run in runs(study, tmp_path))
    assert names == "onebit-seed0 mos-4-experts-seed0 full-precision-seed0 onebit-seed1 mos-4-experts-seed1"
    arguments = runs(study, tmp_path)[3].arguments(study.base)
    assert arguments[:2] == ["base.yaml", "binarize.method=onebit"]
    assert set(arguments[2:]) == {f"run.dir={tmp_path}", "run.name=onebit-seed1", "train.seed=1"}


def test_an_ordering_holds_only_beyond_the_seeds(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [30.0, 20.0, 25.0, 32.0, 22.0])
    found = {(low, high): verdict for low, high, verdict in verdicts(study, outcomes(study, tmp_path))}
    assert found == {("MoS, 4 experts", "OneBit"): "holds", ("full precision", "MoS, 4 experts"): "does not hold"}


def test_overlapping_seeds_are_noise_and_unfinished_variants_are_left_out(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [30.0, 20.0, float("nan"), 21.0, 29.0])
    results = outcomes(study, tmp_path)
    assert [outcome.name for outcome in results] == ["OneBit", "MoS, 4 experts"]
    assert [verdict for *_, verdict in verdicts(study, results)] == ["within seed noise", "not run"]
    text = compare.table(study, results)
    assert "| OneBit | 30.00, 21.00 | 1.50 | 512 | 1.5 |" in text
    compare.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_heldout_figures_says_what_to_set(study: Study, tmp_path: Path) -> None:
    finish(study, tmp_path, [1.0] * 5)
    metrics = runs(study, tmp_path)[0].folder / "metrics.jsonl"
    metrics.write_text('{"step": 0, "tokens": 0, "model/bits_per_weight": 1}\n')
    with pytest.raises(UserError, match=r"onebit-seed0 has no heldout/perplexity .* set data\.heldout"):
        outcomes(study, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("base: base.yaml", "basis: base.yaml", "must have base"),
        ("name: OneBit", "title: OneBit", "variants.0. has no name"),
        ("name: OneBit", "name: mos 4 EXPERTS", "two variants are called 'MoS, 4 experts'"),
        ("seeds: [0, 1]", "seeds: []", "'OneBit' has no seeds"),
        ('- ["MoS, 4 experts", OneBit]', "- [TwoBit, OneBit]", "no variant is called 'TwoBit'"),
        ("expect:", "expects:", "unknown keys expects"),
        ("set: [binarize.enabled=false]", "sets: []", "'full precision' has unknown keys sets"),
        ("base: base.yaml", "base: [", "cannot be read"),
    ],
)
def test_a_wrong_study_is_refused_with_a_reason(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(TEXT.replace(old, new))
    with pytest.raises(UserError, match=complaint):
        load_study(path)


def test_names_become_folders() -> None:
    assert slug("PB-LLM 10 %, Hessian (r=0.1)") == "pb-llm-10-hessian-r-0.1"


@pytest.mark.parametrize("path", sorted((ROOT / "launch/studies").glob("smollm2.yaml")), ids=lambda path: path.name)
def test_every_variant_of_a_shipped_study_is_a_configuration_that_runs(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    for run in runs(study, Path("runs")):
        load_config(study.base, run.arguments(study.base)[1:])
