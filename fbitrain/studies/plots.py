"""A study's pictures: every variant's bits per byte, and curves over training tokens."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fbitrain.base.files import replacing
from fbitrain.studies.results import Outcome
from fbitrain.studies.study_file import Plot, Study, slug


@dataclass(frozen=True)
class Point:
    """A place on a curve: after how many tokens, the median over seeds, the least and the most."""

    tokens: int
    middle: float
    low: float
    high: float


def draw(study: Study, results: Sequence[Outcome], folder: Path) -> list[Path]:
    """Writes all pictures of a study to `folder`; returns their paths. A plot of which nothing has run is left out."""
    paths = [folder / "bits_per_byte.png"]
    _draw_overview(results, paths[0])
    for plot in study.plots:
        curves = curves_of(plot, results)
        if curves:
            path = folder / f"{slug(plot.name)}.png"
            _draw_curves(curves, path, f"{plot.name}: held-out bits per byte")
            paths.append(path)
        if gaps := gaps_of(plot, curves):
            path = folder / f"{slug(plot.name)}_gap.png"
            _draw_curves(gaps, path, f"{plot.name}: bits per byte above {plot.reference}, %")
            paths.append(path)
    return paths


def curves_of(plot: Plot, results: Sequence[Outcome]) -> dict[str, list[Point]]:
    """Group -> its points in the order of their tokens; seeds and groups without a finite figure are left out."""
    by_name = {outcome.name: outcome for outcome in results}
    curves = {}
    for group, names in plot.groups:
        points = []
        for name in names:
            values = [value for value in by_name[name].bits_per_byte if math.isfinite(value)] if name in by_name else []
            if values:
                points.append(Point(by_name[name].tokens, statistics.median(values), min(values), max(values)))
        if points:
            curves[group] = sorted(points, key=lambda point: point.tokens)
    return curves


def gaps_of(plot: Plot, curves: dict[str, list[Point]]) -> dict[str, list[Point]]:
    """How far each other curve lies above the reference's, in percent, where both have a point at the same tokens.

    The least is that of the group's best seed above the reference's worst, and the most the other way round.
    """
    reference = {point.tokens: point for point in curves.get(plot.reference, ())}
    gaps = {}
    for group, points in curves.items():
        pairs = [(point, reference[point.tokens]) for point in points if point.tokens in reference]
        if pairs and group != plot.reference:
            gaps[group] = [
                Point(
                    point.tokens,
                    100 * (point.middle / other.middle - 1),
                    100 * (point.low / other.high - 1),
                    100 * (point.high / other.low - 1),
                )
                for point, other in pairs
            ]
    return gaps


def _draw_curves(curves: dict[str, list[Point]], path: Path, title: str) -> None:
    """A line per group through the medians; bars from the least to the most of the seeds."""
    with axes_of(path, (7.5, 4.5)) as axes:
        for group, points in curves.items():
            below = [point.middle - point.low for point in points]
            above = [point.high - point.middle for point in points]
            tokens, middles = [point.tokens for point in points], [point.middle for point in points]
            axes.errorbar(tokens, middles, yerr=(below, above), marker="o", markersize=4, capsize=3, label=group)
        axes.set(xscale="log", xlabel="training tokens", title=title)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")


def _draw_overview(results: Sequence[Outcome], path: Path) -> None:
    """A row per variant, a point per seed."""
    with axes_of(path, (9, 0.32 * len(results) + 1.2)) as axes:
        for y, outcome in enumerate(results):
            finite = [value for value in outcome.bits_per_byte if math.isfinite(value)]
            axes.plot(finite, [y] * len(finite), "o", color="tab:blue", alpha=0.7)
        labels = [f"{outcome.name} ({outcome.bits_per_weight:.2f} bits)" for outcome in results]
        axes.set(xlabel="held-out bits per byte, a point per seed", yticks=range(len(results)))
        axes.set_yticklabels(labels, fontsize=8)
        axes.invert_yaxis()
        axes.grid(alpha=0.3)


@contextmanager
def axes_of(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes to draw on; what was drawn replaces `path` as a whole."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    try:
        yield axes
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    finally:
        pyplot.close(figure)
