"""Predicted against measured loss, one panel for each estimator."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpq.viz.plots import BLUE, GREY, LOSSES, new_axes

if TYPE_CHECKING:
    from mpq.comparison import Comparison, EstimatorScore

_COLUMNS = 4


def plot_comparison(comparison: Comparison) -> Figure:
    """Small multiples on log axes, the best rank correlation first.

    The dashed line is where prediction and measurement agree; panels of estimators in another unit have none.

    Args:
        comparison: What to draw.
    """
    columns = min(_COLUMNS, len(comparison.scores))
    rows = math.ceil(len(comparison.scores) / columns)
    first = new_axes(None, width=1 + 2.7 * columns, height=0.5 + 2.7 * rows)
    figure = cast(Figure, first.figure)
    first.remove()
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for ax, score in zip(panels, comparison.scores, strict=False):
        _draw(ax, comparison, score)
    for ax in panels[len(comparison.scores) :]:
        ax.remove()
    figure.supxlabel("predicted loss", fontsize=10)
    figure.supylabel(f"measured {LOSSES[comparison.quantity]}", fontsize=10)
    return figure


def _draw(ax: Axes, comparison: Comparison, score: EstimatorScore) -> None:
    predicted, measured = comparison.predictions[score.name], comparison.measured
    shown = predicted > 0
    ax.scatter(predicted[shown], measured[shown], s=16, color=BLUE, alpha=0.75, lw=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    if score.log10_error is not None:
        ends = [measured.min(), measured.max()]
        ax.plot(ends, ends, color=GREY, lw=1, ls="--", zorder=1)
    ax.grid(True, which="major", color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    text = f"{score.name}\nSpearman {score.spearman:.3f}"
    if not math.isnan(score.low):
        text += f" ({score.low:.3f} to {score.high:.3f})"
    if not shown.all():
        text += f"\n{(~shown).sum()} of {len(shown)} predicted at or below 0"
    ax.set_title(text, fontsize=9, loc="left")
