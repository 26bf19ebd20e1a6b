"""Plot of an estimate: time by layer and scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from mpq.viz.plots import _new_axes, label_ticks

if TYPE_CHECKING:
    from mpq.estimates import Estimate


def plot_estimate(estimate: Estimate, ax: Axes | None = None) -> Axes:
    """Time of each layer (log axis) in execution order, one line for each scheme.

    Args:
        estimate: What to draw.
        ax: Where to; a new figure by default.
    """
    ax = _new_axes(ax, 9, 4.4)
    place = np.arange(len(estimate.layers))
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(estimate.schemes)))
    for s, (scheme, colour) in enumerate(zip(estimate.schemes, colours, strict=True)):
        total = f"{estimate.times.total[:, s].sum() * 1e6:,.4g} us"
        seconds = estimate.times.total[:, s] * 1e6
        ax.plot(place, seconds, color=colour, marker="o", ms=4, lw=1, label=f"{scheme}, all {total}")
    ax.set_yscale("log")
    ax.set_ylabel("microseconds")
    ax.set_title(f"{estimate.device.name}, batch {estimate.device.setting.batch}")
    label_ticks(ax, estimate.layers)
    ax.legend(fontsize=8)
    return ax
