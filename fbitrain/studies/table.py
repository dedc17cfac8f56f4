"""A study's outcomes as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fbitrain.studies.results import Outcome, Trial, verdicts
from fbitrain.studies.study_file import Study

COLUMNS = (
    *("variant", "bits per byte (each seed)", "median", "perplexity", "bits per weight"),
    *("training tokens", "tokens per weight", "minutes", "TFLOP"),
)


def table(study: Study, results: Sequence[Outcome]) -> str:
    """A row per variant, then what its grid gave, then the orderings."""
    rows = [*_head(COLUMNS), *map(_row, results)]
    if tuned := [outcome for outcome in results if outcome.trials]:
        rows += ["", *_head(("variant", "tuned", "bits per byte at each value", "best"))]
        rows += map(_grid_row, tuned)
    if orderings := list(verdicts(study, results)):
        rows += ["", *_head(("expected to be lower", "than", ""))]
        rows += [f"| {low} | {high} | {verdict} |" for low, high, verdict in orderings]
    return "\n".join(rows) + "\n"


def _head(columns: Sequence[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _row(outcome: Outcome) -> str:
    cells = [
        outcome.name,
        ", ".join(f"{value:.3f}" for value in outcome.bits_per_byte),
        f"{outcome.median:.3f}",
        ", ".join(f"{value:,.2f}" for value in outcome.perplexities),
        f"{outcome.bits_per_weight:.2f}",
        f"{outcome.tokens:,}",
        f"{outcome.tokens / outcome.weights:.1f}" if outcome.weights else "–",
        f"{outcome.seconds / 60:.1f}" if math.isfinite(outcome.seconds) else "not timed",
        f"{outcome.flops / 1e12:,.1f}" if math.isfinite(outcome.flops) else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _grid_row(outcome: Outcome) -> str:
    each = ", ".join(f"{trial.setting}: {_figure(trial, outcome)}" for trial in outcome.trials)
    best = outcome.setting + (" (an edge of the grid)" if outcome.at_edge else "")
    return f"| {outcome.name} | {outcome.grid_key} | {each} | {best} |"


def _figure(trial: Trial, outcome: Outcome) -> str:
    if not trial.bits_per_byte:
        return "failed" if trial.failed else "not run"
    text = " / ".join(f"{value:.3f}" for value in trial.bits_per_byte)
    return f"**{text}**" if trial.setting == outcome.setting else text
