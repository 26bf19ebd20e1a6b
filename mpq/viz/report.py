"""A self-contained HTML report of a config: no network, no script."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jinja2
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpq.config import BitConfig
from mpq.units import si
from mpq.viz.plots import plot_bits, plot_frontier, plot_measured

if TYPE_CHECKING:
    from mpq.frontier import Frontier


def write_report(
    config: BitConfig,
    path: str | Path,
    *,
    frontier: Frontier | None = None,
    measured: Mapping[str, BitConfig] | None = None,
    title: str | None = None,
) -> Path:
    """Write the report.

    Args:
        config: What it is about.
        path: Where to.
        frontier: Draw it, with the config marked.
        measured: Label -> measured config, for a table of comparison.
        title: Heading; names the model's class by default.
    """
    environment = jinja2.Environment(loader=jinja2.PackageLoader("mpq.viz", "."), autoescape=True)
    html = environment.get_template("report.html.j2").render(
        title=title or f"Bit allocation of {config.provenance.get('model_class', 'a model')}",
        cfg=config,
        cards=_cards(config),
        figures=_figures(config, frontier),
        comparison=[(n, c) for n, c in (measured or {}).items() if c.measured is not None],
        max_bits=max(c.weight.bits for c in config.layers.values()),
        outside=_outside(config),
    )
    Path(path).write_text(html, "utf8")
    return Path(path)


def _cards(cfg: BitConfig) -> list[tuple[str, str, str]]:
    size = cfg.metrics["size"]
    cards = [
        ("size", si(size["value"], "B"), f"{size['value'] / size['float']:.1%} of float"),
        ("average bits", f"{cfg.avg_bits:.2f}", f"{cfg.stored_bits:.2f} with scales"),
    ]
    if "bitops" in cfg.metrics:
        ops = cfg.metrics["bitops"]
        cards.append(("BitOps", si(ops["value"], ""), f"{ops['value'] / ops['float']:.1%} of float"))
    stderr, joint = cfg.predicted["stderr"], cfg.predicted["with_interactions"]
    cards.append(
        (
            f"predicted {cfg.provenance.get('loss', 'loss')} rise",
            f"{cfg.predicted['loss'] if joint is None else joint:.4g}",
            f"± {stderr:.1g}" if stderr is not None else "",
        )
    )
    if cfg.measured is not None and cfg.measured.accuracy is not None:
        base = cfg.measured.float_accuracy
        cards.append(("accuracy", f"{cfg.measured.accuracy:.2%}", f"float {base:.2%}" if base is not None else ""))
    return cards


def _figures(config: BitConfig, frontier: Frontier | None) -> list[tuple[str, str]]:
    figures = [("Bits by layer", svg(plot_bits(config, _axes(9, 3.6))))]
    if frontier is not None:
        figures.insert(0, ("Frontier", svg(plot_frontier(frontier, _axes(9, 4), mark=[config]))))
    return figures


def _axes(width: float, height: float) -> Axes:
    return Figure(figsize=(width, height), layout="constrained").add_subplot()


def svg(ax: Axes) -> str:
    """The figure of some axes as SVG text; same picture, same bytes."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "mpq", "svg.fonttype": "none"}):
        cast(Figure, ax.figure).savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _outside(cfg: BitConfig) -> list[tuple[str, int, int, int]]:
    """Reason, modules, parameters and MACs of what was not searched."""
    rows: dict[str, list[Any]] = {}
    for o in cfg.outside:
        row = rows.setdefault(o.reason, [0, 0, 0])
        row[0] += 1
        row[1] += o.parameters
        row[2] += o.macs
    return [(reason, *row) for reason, row in rows.items()]


def save_overview(
    front: Frontier, series: Mapping[str, list[BitConfig]], mark: list[BitConfig], path: str | Path
) -> Path:
    """Two plots side by side as PNG: predicted frontier, and measured accuracy.

    Args:
        front: For the left plot.
        series: For the right plot, see `plot_measured`.
        mark: Configs to mark on the left.
        path: Where to.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_frontier(front, left, mark=mark)
    plot_measured(series, right)
    figure.savefig(path, dpi=130)
    return Path(path)
