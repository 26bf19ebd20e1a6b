"""Plots of a sensitivity table: losses by group, and what groups do to each other."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from mpq.sensitivity.interaction import dependency
from mpq.sensitivity.table import SensitivityTable
from mpq.viz.plots import LOSSES, label_ticks, new_axes


def plot_sensitivity(table: SensitivityTable, ax: Axes | None = None) -> Axes:
    """Predicted loss of each scheme (log axis) by group in execution order, with two standard errors.

    Args:
        table: What to draw.
        ax: Where to; a new figure by default.
    """
    ax = new_axes(ax, 9, 4.4)
    place = np.arange(len(table.groups))
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(table.schemes)))
    for s, (scheme, colour) in enumerate(zip(table.schemes, colours, strict=True)):
        loss, error = table.loss[:, s], 2 * np.nan_to_num(table.stderr[:, s])
        shown = loss > 0
        # A bar that would reach zero can't be drawn on a log axis.
        below = np.minimum(error, 0.9 * loss)
        ax.errorbar(
            place[shown],
            loss[shown],
            np.stack([below, error])[:, shown],
            color=colour,
            marker="o",
            ms=4,
            lw=1,
            capsize=2,
            label=scheme,
        )
    ax.set_yscale("log")
    name = str(table.provenance.get("loss"))
    ax.set_ylabel(f"predicted {LOSSES.get(name, name)}")
    label_ticks(ax, table.groups)
    ax.grid(True, axis="y", which="major", alpha=0.3)
    ax.legend(title="scheme", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def plot_interactions(table: SensitivityTable, schemes: str | None = None, ax: Axes | None = None) -> Axes:
    """Heat map of how groups' errors amplify (orange) or cancel (purple) each other.

    Args:
        table: With interactions.
        schemes: The scheme of all groups; None takes the one of the largest total loss.
        ax: Where to; a new figure by default.

    Raises:
        MpqError: If the table has no interactions or no such scheme.
    """
    found = dependency(table, schemes)
    ax = new_axes(ax, 6.4, 5.6)
    off = found.correlation - np.diag(np.diag(found.correlation))
    most = max(float(np.abs(off).max()), 1e-3)
    np.fill_diagonal(off, np.nan)
    image = ax.imshow(off, cmap="PuOr_r", vmin=-most, vmax=most)
    figure = ax.figure
    figure.colorbar(image, ax=ax, shrink=0.8, label="correlation of errors")
    label_ticks(ax, table.groups)
    label_ticks(ax, table.groups, "y")
    ax.set_title(f"Interactions at {found.schemes[0]}", fontsize=10)
    return ax
