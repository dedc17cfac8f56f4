"""A run's schedules as a picture: learning rate, weight decay and tokens per step, over steps and tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fbitrain.base.errors import UserError
from fbitrain.base.files import naming_unwritable, replacing
from fbitrain.config import Config
from fbitrain.optim.schedules import batch_spans, decay_shape, lr_shape, tokens_after

N_POINTS = 1500  # steps of a curve, besides those at which it bends
FEW = 30  # steps that are shown each with its point
INCHES = (9.0, 7.0)
RATE, DECAY, TOKENS, BORDER = "#1f5fa8", "#a8541f", "#3f8f5f", "#777777"
FULL_PRECISION, ANNEALED = "#f2d98b", "#d9c7ec"


def draw_schedules(config: Config, path: Path) -> None:
    """Writes a PNG with a panel each for learning rate, weight decay and tokens per step.

    Phases of precision are shaded, steps at which the stream's mixture changes are dotted. Raises UserError for a run
    of no steps and for a file that cannot be written.
    """
    from matplotlib.figure import Figure  # a figure of its own draws without a display
    from matplotlib.ticker import MaxNLocator

    if config.train.total_steps < 1:
        raise UserError("train.total_steps=0 leaves no step to draw; leave --picture out, or train for some steps")
    figure = Figure(figsize=INCHES, layout="constrained")
    rate, decay, tokens = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1.3, 1.5))
    _draw_rate(rate, config)
    _draw_decay(decay, config)
    _draw_tokens(tokens, config)
    for panel in (rate, decay, tokens):
        _mark_phases(panel, config)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    rate.set_xlim(0, config.train.total_steps)
    _add_token_axis(rate, config)
    tokens.set_xlabel("step")
    tokens.xaxis.set_major_locator(MaxNLocator(integer=True))
    tokens.xaxis.set_major_formatter("{x:,.0f}")
    total = short(tokens_after(config.train, config.train.total_steps))
    title = f"{config.run.name}: {config.optim.schedule}, {config.train.total_steps:,} steps, {total} tokens"
    figure.suptitle(title, fontsize=11, parse_math=False)
    if handles := dict(_legend(rate, decay, tokens)):
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    with naming_unwritable(path), replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def short(number: float) -> str:
    """A number of tokens in a few characters: 1.26T, 524k."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def _steps(config: Config) -> npt.NDArray[np.int64]:
    """Steps to draw: spread evenly, and both sides of every corner."""
    optim, total = config.optim, config.train.total_steps
    corners = [1, optim.warmup_steps, total - optim.cooldown_steps, optim.stage2_step, total]
    near = [step + side for step in corners for side in (-1, 0, 1)]
    even = np.linspace(1, total, min(total, N_POINTS)).round().astype(int).tolist()
    return np.unique([step for step in (*even, *near) if 1 <= step <= total])


def _line(steps: npt.NDArray[np.int64]) -> dict[str, Any]:
    """How the curve through `steps` is drawn; a single step would be no line."""
    return {"linewidth": 1.8, "marker": "o" if len(steps) <= FEW else "", "markersize": 4}


def _draw_rate(panel: Any, config: Config) -> None:
    """One curve in shares of the peak, and an axis for each peak that it is multiplied with."""
    optim, steps = config.optim, _steps(config)
    shares = [lr_shape(optim, config.train.total_steps, int(step)) for step in steps]
    panel.plot(steps, shares, color=RATE, **_line(steps))
    panel.set_ylim(0, 1.06)
    panel.set_ylabel("learning rate\n(share of its peak)")
    peaks = {"optim.lr": optim.lr} | ({"optim.muon.lr": optim.muon.lr} if optim.optimizer == "muon" else {})
    _add_absolute_axes(panel, peaks)


def _draw_decay(panel: Any, config: Config) -> None:
    optim, steps = config.optim, _steps(config)
    shares = [decay_shape(optim, config.train.total_steps, int(step)) for step in steps]
    panel.plot(steps, shares, color=DECAY, **_line(steps))
    panel.set_ylim(-0.06, 1.12)
    panel.set_ylabel("weight decay\n(share)")
    fulls = {"weight_decay": optim.weight_decay}
    fulls |= {"muon.weight_decay": optim.muon.weight_decay} if optim.optimizer == "muon" else {}
    _add_absolute_axes(panel, {name: full for name, full in fulls.items() if full > 0})


def _draw_tokens(panel: Any, config: Config) -> None:
    first_steps, sizes = zip(*batch_spans(config.train), strict=True)
    edges = [first - 1 for first in first_steps] + [config.train.total_steps]
    panel.stairs(sizes, edges, color=TOKENS, linewidth=1.8, fill=False)
    panel.stairs(sizes, edges, color=TOKENS, fill=True, alpha=0.13)
    panel.set_ylim(0, max(sizes) * 1.35)
    panel.set_ylabel("tokens\nper step")
    panel.yaxis.set_major_formatter(lambda value, _: short(value))
    for edge, size in zip(edges, sizes, strict=False):
        panel.annotate(short(size), (edge, size), xytext=(4, 3), textcoords="offset points", fontsize=8, color=TOKENS)


def _add_absolute_axes(panel: Any, peaks: dict[str, float]) -> None:
    """On the right, what the shares are of each peak."""
    for i, (name, peak) in enumerate(peaks.items()):
        axis = panel.secondary_yaxis(1 + 0.14 * i, functions=(lambda y, p=peak: y * p, lambda y, p=peak: y / p))
        axis.set_ylabel(name, fontsize=9)
        axis.yaxis.set_major_formatter("{x:.3g}")
        axis.tick_params(labelsize=8)


def _add_token_axis(panel: Any, config: Config) -> None:
    """Above, the tokens that are seen after a step; where the batch grows, they run ahead of the steps."""
    train = config.train
    knots = np.array([0, *(first - 1 for first, _ in batch_spans(train) if first > 1), train.total_steps], float)
    seen = np.array([tokens_after(train, int(step)) for step in knots], float)
    # Matplotlib also asks for places outside the panel, where an inverse must be one too.
    knots = np.array([2 * knots[0] - knots[1], *knots, 2 * knots[-1] - knots[-2]])
    seen = np.array([2 * seen[0] - seen[1], *seen, 2 * seen[-1] - seen[-2]])
    axis = panel.secondary_xaxis(
        "top", functions=(lambda x: np.interp(x, knots, seen), lambda x: np.interp(x, seen, knots))
    )
    axis.set_xlabel("tokens seen")
    axis.xaxis.set_major_formatter(lambda value, _: short(value))


def _mark_phases(panel: Any, config: Config) -> None:
    binarize, total = config.binarize, config.train.total_steps
    border = binarize.from_step
    spans = (
        (0, border, FULL_PRECISION, "full precision"),
        (border, border + binarize.anneal_steps, ANNEALED, "annealed to binary"),
    )
    for start, end, color, label in spans:
        if binarize.enabled and start < min(end, total):
            panel.axvspan(start, min(end, total), color=color, alpha=0.45, linewidth=0, zorder=0, label=label)
    for phase in config.data.phases:
        if phase.from_step < total:
            panel.axvline(phase.from_step, color=BORDER, linestyle=":", linewidth=1.1, label="data.phases")


def _legend(*panels: Any) -> Iterator[tuple[str, Any]]:
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            yield label, handle
