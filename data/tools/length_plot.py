"""Draws a histogram of the document lengths of each source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fbitrain.data.tools.survey import Survey

N_COLUMNS = 3
PANEL_INCHES = (4.0, 2.8)
BINS_PER_DECADE = 8


def plot_lengths(surveys: Sequence[Survey], seq_len: int, path: Path) -> None:
    """Writes a PNG with one panel per source: shares of documents, and of their text, by length on a log axis.

    A dashed line marks what `seq_len` tokens hold. Raises OSError.
    """
    from matplotlib.figure import Figure  # a figure of its own draws without a display

    n_columns = min(N_COLUMNS, len(surveys))
    n_rows = -(-len(surveys) // n_columns)
    width, height = PANEL_INCHES
    figure = Figure(figsize=(width * n_columns, height * n_rows + 0.5), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for panel in panels[len(surveys) :]:
        panel.axis("off")
    for panel, survey in zip(panels, surveys, strict=False):
        _draw(panel, survey, seq_len)
    legend = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _draw(panel: Any, survey: Survey, seq_len: int) -> None:
    lengths = survey.lengths
    panel.set_title(f"{survey.source.name} ({len(lengths):,} documents)", fontsize=10, parse_math=False)
    panel.set_xscale("log")
    panel.set_xlabel("UTF-8 bytes per document" if survey.is_text else "ids per document", fontsize=9)
    panel.set_ylabel("%", fontsize=9)
    panel.tick_params(labelsize=8)
    if not len(lengths):
        return
    first, last = np.floor(np.log10(lengths.min())), np.floor(np.log10(lengths.max())) + 1
    borders = np.logspace(first, last, int(last - first) * BINS_PER_DECADE + 1)
    shares = np.histogram(lengths, borders)[0] / len(lengths) * 100
    text_shares = np.histogram(lengths, borders, weights=lengths)[0] / lengths.sum() * 100
    panel.stairs(shares, borders, fill=True, color="#9ecae1", label="documents")
    panel.stairs(text_shares, borders, color="#d95f02", linewidth=1.5, label="text")
    panel.axvline(_in_units(survey, seq_len), color="black", linestyle="--", linewidth=1, label=f"{seq_len} tokens")


def _in_units(survey: Survey, n_tokens: int) -> float:
    """How long a document of that many tokens is."""
    return n_tokens / survey.tokens_per_byte if survey.tokens_per_byte else float(n_tokens)
