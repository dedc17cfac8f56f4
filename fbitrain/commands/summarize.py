"""What a run achieved: held-out figures before and after, beside the teacher's, and a picture of the loss.

`summarize.py runs/NAME releases/NAME` reads the run's metrics.jsonl, and from the release eval_*.json and sample.txt as
quickstart.sh leaves them; it prints a table and draws loss.png into the release.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fbitrain.base.errors import UserError
from fbitrain.studies.plots import axes_of

EVALUATED = ("dense", "packed", "teacher")  # in releases/NAME/eval_*.json, as quickstart.sh writes them
Row = tuple[str, float, float]  # name, perplexity, bits per byte


def main(arguments: argparse.Namespace) -> int:
    metrics = read_metrics(arguments.run / "metrics.jsonl")
    before = first_heldout(metrics, arguments.run)
    rows = [before, *(evaluation(arguments.release / f"eval_{name}.json", name) for name in EVALUATED)]
    print_table(rows)
    packed = next(row for row in rows if row[0] == "packed")
    print(f"\nperplexity before training / after it (packed): {before[1] / packed[1]:.0f}")
    picture = arguments.release / "loss.png"
    draw_loss(metrics, picture)
    sample = arguments.release / "sample.txt"
    if sample.is_file():
        print(f"\nthe packed model continues a prompt:\n{indented(sample.read_text(encoding='utf-8'))}")
    print(f"\nloss curve   {picture}")
    print(f"TensorBoard  tensorboard --logdir {arguments.run / 'tensorboard'}")
    return 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; raises UserError if there is none."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the folder of a run, such as runs/quickstart") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} has a line that is not JSON ({error}); was it edited?") from None


def first_heldout(metrics: list[dict[str, Any]], run_dir: Path) -> Row:
    """The first held-out evaluation; in a run with eval.every > 0 that is the one before the first step."""
    for line in metrics:
        if "heldout/perplexity" in line:
            name = "before training" if line["step"] == 0 else f"at step {line['step']}"
            return name, line["heldout/perplexity"], line["heldout/bits_per_byte"]
    raise UserError(f"{run_dir} has no held-out evaluation; set data.heldout and eval.every, and train again")


def evaluation(path: Path, name: str) -> Row:
    """The held-out figures in a file written by launch/eval.py; raises UserError if it is missing or holds none."""
    try:
        heldout = json.loads(path.read_text(encoding="utf-8"))["ppl"]["heldout"]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; ./quickstart.sh makes it with launch/eval.py") from None
    except (json.JSONDecodeError, KeyError):
        raise UserError(f"{path} holds no perplexity named heldout; delete it and run ./quickstart.sh again") from None
    return name, heldout["ppl"], heldout["bits_per_byte"]


def print_table(rows: list[Row]) -> None:
    print(f"{'held-out text':<18}{'perplexity':>14}{'bits per byte':>16}")
    for name, perplexity, bits in rows:
        print(f"{name:<18}{perplexity:>14,.1f}{bits:>16.3f}")


def draw_loss(metrics: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out cross-entropy over tokens, both in nats per token."""
    with axes_of(path, (7, 4)) as axes:
        for key, label, style in (
            ("train/loss", "training loss (against the teacher)", "-"),
            ("train/label_ce", "training cross-entropy (text)", "-"),
            ("heldout/nll", "held-out cross-entropy (text)", "o--"),
        ):
            points = [(line["tokens"], line[key]) for line in metrics if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label)
        axes.set(xlabel="training tokens", ylabel="nats per token", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip("\n").splitlines())


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain summarize", description="Sum up a run and its release.")
    commands.add_argument("run", type=Path, help="the run folder, such as runs/quickstart")
    commands.add_argument("release", type=Path, help="its release, which holds eval_*.json")
    return commands
