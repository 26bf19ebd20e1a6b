"""Plots and reports: they draw and compute nothing."""

from mpq.viz.plots import plot_bits, plot_frontier, plot_measured
from mpq.viz.report import write_report

__all__ = ["plot_bits", "plot_frontier", "plot_measured", "write_report"]
