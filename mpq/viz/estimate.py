"""Plot of an estimate: time by layer and scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from mpq.units import si
from mpq.viz.plots import label_ticks, new_axes

if TYPE_CHECKING:
    from mpq.estimates import Estimate


_WIDE = 10  # times that differ more are on a log axis


def plot_estimate(estimate: Estimate, ax: Axes | None = None) -> Axes:
    """Time of each layer (on a log axis where they differ much) in execution order, one line for each scheme.

    Args:
        estimate: What to draw.
        ax: Where to; a new figure by default.
    """
    ax = new_axes(ax, 9, 4.4)
    place = np.arange(len(estimate.layers))
    colours = mpl.colormaps["viridis"](np.linspace(0.05, 0.85, len(estimate.schemes)))
    for s, (scheme, colour) in enumerate(zip(estimate.schemes, colours, strict=True)):
        total = si(float(estimate.times.total[:, s].sum()), "s")
        seconds = estimate.times.total[:, s]
        ax.plot(place, seconds, color=colour, marker="o", ms=4, lw=1, label=f"{scheme}, all {total}")
    if estimate.times.total.max() > _WIDE * estimate.times.total.min():
        ax.set_yscale("log")
    ax.yaxis.set_major_formatter(EngFormatter("s"))
    ax.set_title(f"{estimate.device.name}, batch {estimate.device.setting.batch}")
    label_ticks(ax, estimate.layers)
    ax.legend(fontsize=8)
    return ax
