"""The demo: the whole path on the bundled ResNet-20, measured on real test images."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import mpq
from mpq.bundled import load_example
from mpq.config import BitConfig, Measured
from mpq.frontier import Frontier
from mpq.tables import print_config
from mpq.viz import plot_frontier, plot_measured

_UNIFORM = ("W4A8", "W3A8")


def run_demo(folder: Path, seed: int, console: Console) -> dict[str, BitConfig]:
    """Analyze, allocate at the sizes of uniform 4 and 3 bits, measure, and write the files.

    Args:
        folder: For bits.json, pareto.png and report.html.
        seed: Of the random probes.
        console: Where to print.

    Returns:
        Label -> measured config.
    """
    started = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    model, calib, test = load_example()
    console.print(
        "ResNet-20 on Fashion-MNIST: 512 calibration images (no labels used), 2,000 test images",
        highlight=False,
        soft_wrap=True,
    )
    analysis = mpq.analyze(model, calib, seed=seed)
    console.print(f"layer graph: {analysis.space.graph.summary()}", highlight=False, soft_wrap=True)
    console.print(
        f"sensitivity: {analysis.table.provenance['estimator']}, "
        f"{analysis.provenance['forward_passes']} forward passes of the calibration set",
        highlight=False,
        soft_wrap=True,
    )
    evaluator = mpq.Evaluator(model, test)
    configs: dict[str, BitConfig] = {}
    for scheme in _UNIFORM:
        uniform = analysis.uniform(scheme)
        mixed = analysis.allocate(f"size<={_kilobytes(uniform.size_bytes)}kB")
        for label, config in ((f"uniform {scheme}", uniform), (f"mixed, size of {scheme}", mixed)):
            configs[label] = config.with_measured(evaluator.measure(config))
    best = configs[f"mixed, size of {_UNIFORM[0]}"]
    print_config(best, console)
    console.print(_comparison(configs, evaluator.float_measured, analysis.costs["size"].reference))
    for scheme in _UNIFORM:
        console.print(_verdict(scheme, configs), highlight=False, soft_wrap=True)

    front = analysis.pareto("size")
    along = np.linspace(configs["uniform W3A8"].size_bytes, configs["uniform W4A8"].size_bytes * 1.15, 6)
    path = [front.at(f"size<={_kilobytes(limit)}kB") for limit in along]
    series = {
        "mixed": [c.with_measured(evaluator.measure(c)) for c in path],
        "uniform": [configs[f"uniform {s}"] for s in _UNIFORM],
    }
    marked = [configs[f"mixed, size of {s}"] for s in _UNIFORM]
    written = [
        best.save(folder / "bits.json"),
        _save_overview(front, series, marked, folder / "pareto.png"),
        best.report(folder / "report.html", frontier=front, measured=configs),
    ]
    console.print(
        f"wrote {', '.join(map(str, written))} in {time.perf_counter() - started:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    return configs


def _save_overview(front: Frontier, series: Mapping[str, list[BitConfig]], mark: list[BitConfig], path: Path) -> Path:
    """Two plots side by side: the predicted frontier with marked configs, and measured accuracy."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_frontier(front, left, mark=mark)
    plot_measured(series, right)
    figure.savefig(path, dpi=130)
    return path


def _kilobytes(size_bytes: float) -> float:
    """Rounded down to 0.1 kB, so that the limit is never above the size."""
    return math.floor(size_bytes / 100) / 10


def _comparison(configs: dict[str, BitConfig], floats: Measured, float_bytes: float) -> Table:
    table = Table("config", "size (kB)", "avg bits", "accuracy", "loss", "KL to float")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("float", f"{float_bytes / 1e3:,.1f}", "32.00", f"{floats.accuracy:.2%}", f"{floats.loss:.4f}", "0")
    for label, c in configs.items():
        m = c.measured
        assert m is not None
        table.add_row(
            label,
            f"{c.size_bytes / 1e3:,.1f}",
            f"{c.avg_bits:.2f}",
            f"{m.accuracy:.2%}",
            f"{m.loss:.4f}",
            f"{m.kl:.5f}",
        )
    return table


def _verdict(scheme: str, configs: dict[str, BitConfig]) -> str:
    """Whether mixed beats uniform at this size, whichever way it went."""
    mixed, uniform = configs[f"mixed, size of {scheme}"].measured, configs[f"uniform {scheme}"].measured
    assert mixed is not None
    assert uniform is not None
    gain = 100 * ((mixed.accuracy or 0) - (uniform.accuracy or 0))
    words = "beats" if gain > 0 else "ties with" if gain == 0 else "does NOT beat"
    return (
        f"At the size of {scheme}, mixed {words} uniform: {gain:+.2f} percentage points, "
        f"KL to float {mixed.kl:.5f} against {uniform.kl:.5f}"
    )
