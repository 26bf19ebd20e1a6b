"""The Plotly figure of an explorer: points above, layers below. It draws and computes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plotly import graph_objects as go

from mpq.viz.explorer_layers import LayerRow
from mpq.viz.explorer_points import Axis, Point
from mpq.viz.explorer_widgets import LiveFigure
from mpq.viz.plots import BLUE, GREEN, GREY, MOST_LABELS, OP_COLOURS, ORANGE, PINK, kind_of

_OTHER = "other"
# Of points on top of each other Plotly takes the smallest: a thick line makes the single ones large, but not for it.
_MARKERS: dict[str, dict[str, Any]] = {
    "frontier": {"color": BLUE, "size": 7},
    "uniform": {"color": ORANGE, "size": 6, "symbol": "square", "line": {"color": ORANGE, "width": 4}},
    "given": {"color": PINK, "size": 6, "symbol": "diamond", "line": {"color": PINK, "width": 5}},
}
_HOVER = "%{hovertext}<extra></extra>"
_LEGEND: dict[str, Any] = {"orientation": "h", "yanchor": "bottom", "x": 0}
_FRAME: dict[str, Any] = {"showline": True, "linecolor": GREY, "zeroline": False}
_TOP_OF_LAYERS = 0.36
_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "autosize": True,
    "height": 780,
    "margin": {"l": 70, "r": 20, "t": 35, "b": 110},
    "hovermode": "closest",
    "hoverlabel": {"align": "left"},
    "barmode": "overlay",
    "legend": {**_LEGEND, "y": 1.01},
    "legend2": {**_LEGEND, "y": _TOP_OF_LAYERS + 0.01},
    "xaxis": {**_FRAME, "anchor": "y"},
    "yaxis": {**_FRAME, "anchor": "x", "domain": [0.51, 1]},
    "xaxis2": {**_FRAME, "anchor": "y2", "tickangle": -90, "showgrid": False},
    "yaxis2": {**_FRAME, "anchor": "x2", "domain": [0, _TOP_OF_LAYERS], "rangemode": "tozero"},
}


class ExplorerFigure:
    """All points on two axes, of which one is marked; below them the layers of one config.

    Args:
        labels: Series -> its name in the legend.

    Attributes:
        figure: A plain figure until `open` makes it live.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._series, self._kinds = list(labels), [*OP_COLOURS, _OTHER]
        ring = {"color": "rgba(0,0,0,0)", "size": 19, "symbol": "circle", "line": {"color": GREEN, "width": 3}}
        # The ring is below the others, so that it catches no clicks.
        points = [go.Scatter(name="chosen", mode="markers", marker=ring, hoverinfo="skip")]
        points += [_series_trace(series, label) for series, label in labels.items()]
        below = {"xaxis": "x2", "yaxis": "y2", "legend": "legend2"}
        colours = {**OP_COLOURS, _OTHER: GREY}
        bars = [go.Bar(name=k, marker={"color": c}, hovertemplate=_HOVER, **below) for k, c in colours.items()]
        tick = {"symbol": "line-ew-open", "size": 12, "color": "black", "line": {"width": 2}}
        ups = go.Scatter(name="runner-up", mode="markers", marker=tick, hoverinfo="skip", **below)
        self.figure = go.Figure([*points, *bars, ups], _LAYOUT)

    def open(self, chosen: Callable[[str, int], None]) -> LiveFigure:
        """Make it a widget, with all that was drawn so far.

        Args:
            chosen: Called with series and index of a point that is clicked.
        """
        self.figure = live = LiveFigure(self.figure)
        for series in self._series:
            self.trace(series).on_click(_first_point(series, chosen))
        return live

    def trace(self, series: str) -> Any:
        """The trace of a series."""
        return self.figure.data[1 + self._series.index(series)]

    def layer_traces(self) -> tuple[list[Any], Any]:
        """The bars of each kind of layer, and the marks of runners-up."""
        return list(self.figure.data[-1 - len(self._kinds) : -1]), self.figure.data[-1]

    def draw_points(
        self,
        axes: tuple[Axis, Axis],
        points: Mapping[str, Sequence[Point]],
        texts: Mapping[str, Sequence[str]],
        chosen: Point,
        *,
        joined: bool,
        level: float | None,
    ) -> None:
        """Show points on two axes.

        Args:
            axes: Horizontal and vertical.
            points: Series -> its points.
            texts: Series -> what to show of each when hovered.
            chosen: Which one to mark.
            joined: Draw the frontier as a line: these are its own axes.
            level: Height of the float model's line, if any.
        """
        places = {series: _coordinates(points[series], axes) for series in self._series}
        empty = not any(x is not None for xs, _ in places.values() for x in xs)
        with self.figure.batch_update():
            for series, (xs, ys) in places.items():
                trace = self.trace(series)
                trace.update(x=xs, y=ys, hovertext=list(texts[series]))
                if series == "frontier":
                    trace.mode = "lines+markers" if joined else "markers"
                else:
                    trace.text = [p.name.removeprefix("uniform ") for p in points[series]]
            xs, ys = _coordinates([chosen], axes)
            self.figure.data[0].update(x=xs, y=ys)
            self.figure.update_layout(
                xaxis=_axis(axes[0]),
                yaxis=_axis(axes[1]),
                shapes=[] if level is None else [_level(level)],
                annotations=_notes(level, empty),
            )

    def draw_layers(self, rows: Sequence[LayerRow]) -> None:
        """Bars by depth, coloured by kind and wider with more parameters, and runners-up."""
        bars, ups = self.layer_traces()
        kinds = [k if k in self._kinds else _OTHER for k in (kind_of(row.op) for row in rows)]
        largest = max((row.parameters for row in rows), default=1)
        widths = [0.2 + 0.7 * math.sqrt(row.parameters / largest) for row in rows]
        step = max(1, -(-len(rows) // MOST_LABELS))
        with self.figure.batch_update():
            for kind, trace in zip(self._kinds, bars, strict=True):
                own = [i for i, k in enumerate(kinds) if k == kind]
                trace.update(
                    x=own,
                    y=[rows[i].bits for i in own],
                    width=[widths[i] for i in own],
                    hovertext=[rows[i].hover for i in own],
                    visible=bool(own),
                )
            known = [i for i, row in enumerate(rows) if row.runner_up_bits is not None]
            ups.update(x=known, y=[rows[i].runner_up_bits for i in known], visible=bool(known))
            ticks = {"tickvals": list(range(0, len(rows), step)), "ticktext": [row.name for row in rows[::step]]}
            title = "weight bits (bar width: parameters)"
            bits = {b for row in rows for b in (row.bits, row.runner_up_bits) if b is not None}
            self.figure.update_layout(
                xaxis2={"range": [-0.7, len(rows) - 0.3], "visible": bool(rows), **ticks},
                yaxis2={"tickvals": sorted(bits), "visible": bool(rows), "title": title},
            )


def _series_trace(series: str, label: str) -> go.Scatter:
    return go.Scatter(
        name=label,
        mode="markers" if series == "frontier" else "markers+text",
        marker=_MARKERS[series],
        line={"color": BLUE, "width": 1.2, "shape": "hv"},
        textposition="top right",
        textfont={"color": _MARKERS[series]["color"]},
        hovertemplate=_HOVER,
        cliponaxis=False,
    )


def _first_point(series: str, chosen: Callable[[str, int], None]) -> Callable[..., None]:
    def clicked(trace: Any, points: Any, state: Any) -> None:
        if points.point_inds:  # every trace is told of a click on any
            chosen(series, points.point_inds[0])

    return clicked


def _coordinates(points: Sequence[Point], axes: tuple[Axis, Axis]) -> tuple[list[float | None], list[float | None]]:
    """Where points are; None for what is not known or has no place on a logarithmic axis."""
    pairs = []
    for point in points:
        values = [point.values.get(axis.key) for axis in axes]
        drawn = all(v is not None and (v > 0 or not axis.log) for v, axis in zip(values, axes, strict=True))
        pairs.append(values if drawn else [None, None])
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _axis(axis: Axis) -> dict[str, Any]:
    scale = {"type": "log", "dtick": 1, "exponentformat": "power"} if axis.log else {"type": "linear", "dtick": None}
    return {"title": {"text": axis.label}, "autorange": True, **axis.ticks, **scale}


def _level(height: float) -> dict[str, Any]:
    line = {"color": GREY, "width": 1, "dash": "dash"}
    return {"type": "line", "xref": "x domain", "x0": 0, "x1": 1, "y0": height, "y1": height, "line": line}


def _notes(level: float | None, empty: bool) -> list[dict[str, Any]]:
    notes: list[dict[str, Any]] = []
    if level is not None:
        text = {"text": f"float {level:.2%}", "font": {"color": GREY}, "showarrow": False}
        notes.append({**text, "xref": "x domain", "x": 1, "xanchor": "right", "y": level, "yanchor": "bottom"})
    if empty:
        text = {"text": "Nothing is measured yet: choose a point and press <b>Measure now</b>.", "showarrow": False}
        notes.append({**text, "xref": "x domain", "yref": "y domain", "x": 0.5, "y": 0.5})
    return notes
