"""Plots and reports: they draw and compute nothing."""

from mpq.viz.plots import plot_bits, plot_frontier, plot_measured
from mpq.viz.report import write_report
from mpq.viz.sensitivity import plot_interactions, plot_sensitivity

__all__ = [
    "plot_bits",
    "plot_frontier",
    "plot_interactions",
    "plot_measured",
    "plot_sensitivity",
    "write_report",
]
