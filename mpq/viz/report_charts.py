"""Geometry of the HTML report's charts, in per cent of their boxes, so that they stretch and their text does not."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.ticker import LogLocator, MaxNLocator

from mpq.analysis import Analysis
from mpq.budget import Budget
from mpq.config import BitConfig
from mpq.frontier import Frontier
from mpq.problem import Ints
from mpq.viz.report_tables import Cell, Column, Table, amount, number, weight_bytes

Tick = tuple[float, str]  # place in per cent, and label

KINDS = ("conv", "linear", "embedding", "attention", "other")
_TABLE_POINTS = 9
_LONGEST = 28  # characters of a name beneath a chart
_NAMES = 45  # of layers that fit beneath a chart on a wide screen


@dataclass(frozen=True)
class Mark:
    """A point of a chart: its place from the left and the top, its label, and what it is in words."""

    x: float
    y: float
    label: str
    about: str


@dataclass(frozen=True)
class FrontierChart:
    """Predicted loss against a cost.

    Attributes:
        metric: On the horizontal axis.
        kind: Of the frontier.
        points: Of the frontier, by rising cost.
        uniform: Uniform schemes.
        chosen: The config; None where its loss is 0, which a log axis can't show.
        limit: The budget's limit.
        x_ticks: Of the cost.
        y_ticks: Of the loss.
        table: Some points in figures.
    """

    metric: str
    kind: str
    points: tuple[Mark, ...]
    uniform: tuple[Mark, ...]
    chosen: Mark | None
    limit: Tick | None
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    table: Table

    @property
    def line(self) -> str:
        """SVG path of the steps between the points."""
        first, *rest = self.points
        return f"M{first.x} {first.y}" + "".join(f"H{p.x}V{p.y}" for p in rest)


class _Scale:
    """A linear or logarithmic axis in per cent, with a margin at both ends."""

    def __init__(self, values: Iterable[float], *, log: bool = False) -> None:
        self.log = log
        ends = [math.log10(v) if log else v for v in values]
        pad = 0.05 * (max(ends) - min(ends)) or 0.5
        self.low, self.high = min(ends) - pad, max(ends) + pad

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return round(100 * (at - self.low) / (self.high - self.low), 2)

    def ticks(self) -> list[float]:
        """Round values within the axis."""
        if not self.log:
            found = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
            return [float(v) for v in found if self.low <= v <= self.high]
        low, high = 10**self.low, 10**self.high
        subs = (1.0,) if self.high - self.low > 2 else (1.0, 2.0, 5.0)
        found = LogLocator(subs=subs, numticks=8).tick_values(low, high)
        return [float(v) for v in found if low <= v <= high]


def frontier_chart(front: Frontier, config: BitConfig) -> FrontierChart:
    """The frontier with uniform schemes, a config and the limit of its budget."""
    analysis = front.analysis
    line = list(zip(front.cost.tolist(), front.loss.tolist(), strict=True))
    named = {str(s): _place(front, analysis.pick(analysis.uniform(s))) for s in analysis.space.uniform_schemes}
    here = _place(front, analysis.pick(config))
    drawn = [p for p in (*line, *named.values(), here) if p[1] > 0]
    x, y = _Scale(cost for cost, _ in drawn), _Scale((loss for _, loss in drawn), log=True)

    def mark(cost: float, loss: float, label: str = "") -> Mark:
        about = f"{amount(cost, front.unit)}, predicted rise {number(loss)}"
        return Mark(x(cost), round(100 - y(loss), 2), label, f"{label}: {about}" if label else about)

    limit = None
    for text in (b for b in config.budgets if b.partition("<=")[0] == front.metric):
        at = x(Budget.parse(text).limit(analysis.cost(front.metric).reference))
        limit = (at, text) if at <= 100 else None
    return FrontierChart(
        front.metric,
        front.kind,
        tuple(mark(*p) for p in line if p[1] > 0),
        tuple(mark(*p, name) for name, p in named.items() if p[1] > 0),
        mark(*here, "this config") if here[1] > 0 else None,
        limit,
        [(x(v), amount(v, front.unit)) for v in x.ticks()],
        [(round(100 - y(v), 2), number(v)) for v in y.ticks()],
        _points(front),
    )


def _place(front: Frontier, pick: Ints) -> tuple[float, float]:
    """Cost and loss as the frontier counts them."""
    table = front.analysis.table
    loss = table.predict(pick) if front.interacting else table.total(pick)[0]
    return front.analysis.cost(front.metric).total(pick), loss


def _points(front: Frontier) -> Table:
    """Some points of the frontier, evenly along it."""
    rows = []
    for i in np.unique(np.linspace(0, len(front) - 1, _TABLE_POINTS).astype(int)).tolist():
        cost, loss, bits = float(front.cost[i]), float(front.loss[i]), front[i].avg_bits
        cells = [Cell(amount(cost, front.unit), cost), Cell(number(loss), loss)]
        rows.append((*cells, *([] if front.metric == "avg_bits" else [Cell(f"{bits:.2f}", bits)])))
    heads = (front.metric, "predicted rise", *([] if front.metric == "avg_bits" else ["average bits"]))
    return Table("frontier-table", "Points along the frontier", tuple(map(Column, heads)), tuple(rows))


@dataclass(frozen=True)
class Strip:
    """One row of bars: a height in per cent and what it is in words for each layer."""

    name: str
    bars: tuple[tuple[float, str], ...]
    ticks: list[Tick]


@dataclass(frozen=True)
class DepthChart:
    """Bars by layer in execution order, one strip above the other.

    Attributes:
        layers: Names.
        kinds: Of each layer, for its colour.
        strips: Weight bits, activation bits where they differ, shares of bytes and of the predicted loss.
        labels: Name of each layer to write beneath it; empty where there is no room.
        largest: What is shared out, and the layers with the largest shares.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    strips: tuple[Strip, ...]
    labels: tuple[str, ...]
    largest: tuple[tuple[str, str], ...]


def depth_chart(config: BitConfig) -> DepthChart:
    """What each layer got, takes and costs."""
    choices = list(config.layers.values())
    members = Counter(c.group for c in choices)
    stored = _shares([weight_bytes(c) for c in choices])
    loss = _shares([max(c.predicted_loss, 0.0) / members[c.group] for c in choices])
    strips = [_bits(config, "weight bits", [c.weight.bits for c in choices])]
    active = [0 if c.activation is None else c.activation.bits for c in choices]
    if len({a for a, c in zip(active, choices, strict=True) if c.op != "embedding"}) > 1:
        strips.append(_bits(config, "activation bits (0: float)", active))
    strips += [_share(config, "share of weight bytes", stored), _share(config, "share of predicted rise", loss)]
    kinds = [c.op.split("_")[0].rstrip("123d") for c in choices]
    names = tuple(config)
    step = -(-len(names) // _NAMES)
    return DepthChart(
        names,
        tuple(k if k in KINDS else "other" for k in kinds),
        tuple(strips),
        tuple(_short(n) if i % step == 0 else "" for i, n in enumerate(names)),
        (("predicted rise", _largest(names, loss)), ("weight bytes", _largest(names, stored))),
    )


def _short(name: str) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"


def _shares(values: Sequence[float]) -> list[float]:
    total = sum(values)
    return [v / total if total else 0.0 for v in values]


def _bits(config: BitConfig, name: str, bits: Sequence[int]) -> Strip:
    most = max(bits)
    bars = tuple((round(100 * b / most, 2), f"{layer}: {b}") for layer, b in zip(config, bits, strict=True))
    return Strip(name, bars, [(round(100 - 100 * b / most, 2), str(b)) for b in sorted(set(bits))])


def _share(config: BitConfig, name: str, shares: Sequence[float]) -> Strip:
    most = max(shares) or 1.0
    bars = tuple((round(100 * s / most, 2), f"{layer}: {s:.1%}") for layer, s in zip(config, shares, strict=True))
    return Strip(name, bars, [(0.0, f"{most:.0%}"), (100.0, "0")])


def _largest(names: Sequence[str], shares: Sequence[float]) -> str:
    first = sorted(range(len(names)), key=lambda i: -shares[i])[:3]
    return ", ".join(f"{names[i]} {shares[i]:.0%}" for i in first)


@dataclass(frozen=True)
class Heat:
    """A cell of the heat map: text, colours of ground and text, and whether the config has this scheme."""

    text: str
    ground: str
    ink: str
    chosen: bool


@dataclass(frozen=True)
class HeatMap:
    """Predicted loss of each scheme of each group; None where a group may not have a scheme.

    Attributes:
        schemes: Columns.
        rows: Group and its cells.
        colours: From the least to the most loss.
        ticks: Of the scale.
    """

    schemes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Heat | None, ...]], ...]
    colours: tuple[str, ...]
    ticks: list[Tick]


def heat_map(analysis: Analysis, config: BitConfig) -> HeatMap:
    """Sensitivities on a logarithmic scale of colours that colour-blind people can read."""
    table, allowed, pick = analysis.table, analysis.space.allowed, analysis.pick(config)
    positive = table.loss[allowed & (table.loss > 0)]
    scale = _Scale(positive.tolist() or [1.0], log=True)
    colours = mpl.colormaps["viridis_r"]

    def heat(g: int, s: int) -> Heat | None:
        if not allowed[g, s]:
            return None
        loss = float(table.loss[g, s])
        ground = to_hex(colours(scale(loss) / 100 if loss > 0 else 0.0))
        return Heat(f"{loss:.1e}".replace("e-0", "e-") if loss else "0", ground, _ink(ground), bool(pick[g] == s))

    rows = []
    for g, group in enumerate(analysis.space.groups):
        more = f" (+{len(group.layers) - 1})" if len(group.layers) > 1 else ""
        rows.append((group.name + more, tuple(heat(g, s) for s in range(len(table.schemes)))))
    gradient = tuple(to_hex(colours(i / 8)) for i in range(9))
    return HeatMap(table.schemes, tuple(rows), gradient, [(scale(v), number(v)) for v in scale.ticks()])


def _ink(ground: str) -> str:
    """Black or white, whichever has more contrast (WCAG 2: at least 4.5 for one of the two)."""
    parts = [int(ground[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#000" if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else "#fff"
