"""The quickstart's last page, from the files a run and its evaluations leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fbitrain.base.command import run
from fbitrain.commands import summarize

METRICS = [
    {"step": 0, "tokens": 0, "heldout/perplexity": 50000.0, "heldout/bits_per_byte": 4.25, "heldout/nll": 10.8},
    {"step": 5, "tokens": 500, "train/loss": 9.0, "train/label_ce": 9.5},
    {"step": 10, "tokens": 1000, "train/loss": 7.0, "train/label_ce": 7.5},
    {"step": 10, "tokens": 1000, "heldout/perplexity": 260.0, "heldout/bits_per_byte": 2.5, "heldout/nll": 5.56},
]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    run_dir, release = tmp_path / "run", tmp_path / "release"
    run_dir.mkdir()
    release.mkdir()
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    for name, ppl in (("dense", 250.0), ("packed", 250.0), ("teacher", 20.5)):
        figures = {"ppl": {"heldout": {"ppl": ppl, "bits_per_byte": ppl / 100}}}
        (release / f"eval_{name}.json").write_text(json.dumps(figures))
    return run_dir, release


def summarized(folders: tuple[Path, Path]) -> int:
    return run(summarize.main, summarize.parser(), [str(folder) for folder in folders])


def test_the_page_holds_every_figure_and_the_picture_is_drawn(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (folders[1] / "sample.txt").write_text("def main(\n  x\n")
    assert summarized(folders) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["before", "training", "50,000.0", "4.250"] in lines
    assert ["packed", "250.0", "2.500"] in lines
    assert ["teacher", "20.5", "0.205"] in lines
    assert ["perplexity", "before", "training", "/", "after", "it", "(packed):", "200"] in lines
    assert ["def", "main("] in lines
    assert ["TensorBoard", "tensorboard", "--logdir", str(folders[0] / "tensorboard")] in lines
    assert (folders[1] / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("damaged", "content", "words"),
    [
        ("run/metrics.jsonl", None, "does not exist"),
        ("run/metrics.jsonl", '{"step"', "not JSON"),
        ("run/metrics.jsonl", '{"step": 5, "tokens": 1, "train/loss": 1.0}', "no held-out evaluation"),
        ("release/eval_packed.json", None, "launch/eval.py"),
        ("release/eval_packed.json", "{}", "no perplexity named heldout"),
    ],
)
def test_what_is_missing_is_one_sentence(
    folders: tuple[Path, Path], damaged: str, content: str | None, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folders[0].parent / damaged
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert summarized(folders) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert str(path.parent) in sentence
    assert words in sentence
