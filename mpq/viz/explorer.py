"""The notebook explorer of a frontier: points to click on, the layers of the chosen one, and what to do with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

import ipywidgets as widgets
from IPython.display import display

from mpq.config import BitConfig, Measured
from mpq.explanation import explain_given
from mpq.viz.explorer_figure import ExplorerFigure
from mpq.viz.explorer_layers import layer_rows, layer_table
from mpq.viz.explorer_measuring import Evaluate, Measuring
from mpq.viz.explorer_points import Given, Point, axes_of, frontier_points, given_points, uniform_points
from mpq.viz.explorer_widgets import PageWidth

if TYPE_CHECKING:
    from mpq.frontier import Frontier

_NO_CONFIG = "Only its figures are known: there are no layers to show, save or measure."
_NO_DATA = "pass evaluate=mpq.Evaluator(model, labelled_batches) to explore()"


class Explorer:
    """An interactive Pareto plot for notebooks; made by `mpq.Frontier.explore`.

    It shows itself as the last line of a cell. Clicking on a point chooses it; cells below can go on with
    ``explorer.config``.

    Attributes:
        widget: All of it, to put into other ipywidgets.

    Args:
        front: What to explore.
        points: Name -> config, or metrics of one that was published.
        evaluate: What measures a config; None without.
    """

    def __init__(self, front: Frontier, points: Mapping[str, Given], evaluate: Evaluate | None) -> None:
        self._front, self._evaluate = front, evaluate
        self._measuring: Measuring | None = None
        self._lock = RLock()  # the thread that measures draws as well
        self._points = {"frontier": frontier_points(front), "uniform": uniform_points(front)}
        labels = {"frontier": f"{front.kind} frontier", "uniform": "uniform"}
        if points:
            self._points["given"], labels["given"] = given_points(front, points), "given"
        self._chosen = "frontier", int(abs(front.cost - (front.cost[0] + front.cost[-1]) / 2).argmin())
        self._axes = axes_of(front)
        metrics = front.analysis.metrics(front.picks[0], [front.metric])
        self._reference = {metric: float(row["float"]) for metric, row in metrics.items()}
        self._figure = ExplorerFigure(labels)
        controls = self._make_controls()
        self._draw_points()
        self._draw_layers()
        self._live = self._figure.open(self._choose)
        self._width = PageWidth()
        self._width.observe(lambda change: self._fit(), names="width")
        self.widget = widgets.VBox([*controls, self._width, self._live, self._table])

    @property
    def config(self) -> BitConfig | None:
        """The config of the chosen point, with what was measured; None for published figures."""
        return self._point.config(self._front.analysis)

    @property
    def measured(self) -> list[BitConfig]:
        """The configs that are measured, those that were given so included."""
        every = [point for points in self._points.values() for point in points if point.measured is not None]
        configs = (point.config(self._front.analysis) for point in every)
        return [config for config in configs if config is not None]

    @property
    def _point(self) -> Point:
        series, index = self._chosen
        return self._points[series][index]

    def _make_controls(self) -> list[widgets.Widget]:
        options = [(axis.label, key) for key, axis in self._axes.items()]
        style = {"style": {"description_width": "initial"}, "layout": {"width": "22em"}}
        self._x = widgets.Dropdown(options=options, value=self._front.metric, description="across", **style)
        self._y = widgets.Dropdown(options=options, value="loss", description="up", **style)
        self._about, self._message, self._table = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self._file = widgets.Text(layout={"width": "15em"}, continuous_update=True)
        self._save = widgets.Button(description="Save JSON", icon="save")
        tip = _NO_DATA if self._evaluate is None else "accuracy and divergence on your data"
        self._measure = widgets.Button(description="Measure now", icon="play", tooltip=tip)
        self._bar = widgets.FloatProgress(min=0, max=1, layout={"width": "12em", "visibility": "hidden"})
        for axis in (self._x, self._y):
            axis.observe(lambda change: self._draw_points(), names="value")
        self._save.on_click(lambda button: self._save_json())
        self._measure.on_click(lambda button: self._measure_now())
        actions = widgets.HBox([self._file, self._save, self._measure, self._bar], layout={"flex_flow": "row wrap"})
        axes = widgets.HBox([self._x, self._y], layout={"flex_flow": "row wrap"})
        return [axes, self._about, actions, self._message]

    def _choose(self, series: str, index: int) -> None:
        with self._lock:
            self._chosen = series, index
            self._draw_points()
            self._draw_layers()

    def _fit(self) -> None:
        with self._lock:
            self._live.update_layout(width=self._width.width)

    def _draw_points(self) -> None:
        x, y = self._axes[self._x.value], self._axes[self._y.value]
        texts = {series: [self._line(point) for point in points] for series, points in self._points.items()}
        joined = (x.key, y.key) == (self._front.metric, "loss")
        float_accuracy = next((m.float_accuracy for c in self.measured if (m := c.measured)), None)
        level = float_accuracy if y.key == "accuracy" else None
        with self._lock:
            self._figure.draw_points((x, y), self._points, texts, self._point, joined=joined, level=level)

    def _line(self, point: Point) -> str:
        return f"<b>{escape(point.name)}</b>: {escape(point.line(self._axes, self._reference))}"

    def _draw_layers(self) -> None:
        point, config = self._point, self.config
        why = None if point.pick is None else explain_given(self._front.analysis, self._front.metric, point.pick)
        told = "" if why is None else f"<br>{self._front.metric} {escape(why.worth(self._front.metric))}"
        rows = [] if config is None else layer_rows(config, why)
        with self._lock:
            self._about.value = self._line(point) + (told if config is not None else f"<br>{_NO_CONFIG}")
            self._message.value = ""
            self._figure.draw_layers(rows)
            self._table.value = layer_table(rows) if rows else ""
            self._file.placeholder = f"bits-{re.sub(r'[^A-Za-z0-9.]+', '-', point.name).strip('-')}.json"
            self._save.disabled = config is None
            self._ready()

    def _ready(self) -> None:
        """The button that measures also stops; a point without layers has nothing to measure."""
        busy = self._measuring is not None
        self._measure.description, self._measure.icon = ("Stop", "stop") if busy else ("Measure now", "play")
        self._measure.disabled = not busy and (self._evaluate is None or self.config is None)
        self._bar.layout.visibility = "visible" if busy else "hidden"

    def _save_json(self) -> None:
        config = self.config
        assert config is not None
        path = Path(self._file.value.strip() or self._file.placeholder).expanduser()
        try:
            config.save(path)
        except OSError as error:
            self._tell(f"Not saved: {error}")
        else:
            self._tell(f"Saved {path.resolve()}; mpq.load({str(path)!r}) reads it.")

    def _measure_now(self) -> None:
        if self._measuring is not None:
            self._measuring.stop()
            return
        config, place = self.config, self._chosen
        assert config is not None
        assert self._evaluate is not None
        name = self._point.name
        self._bar.value = 0.0
        self._tell(f"Measuring {name} ...")

        def progress(share: float, so_far: Measured) -> None:
            self._bar.value = share
            self._tell(f"Measuring {name}: {so_far} so far")

        def done(found: Measured | Exception | None) -> None:
            with self._lock:
                self._measuring = None
                if isinstance(found, Measured):
                    self._keep(place, found)
                self._ready()
                self._tell(_ending(name, found))

        with self._lock:
            self._measuring = Measuring(self._evaluate, config, progress, done)
            self._ready()

    def _keep(self, place: tuple[str, int], measured: Measured) -> None:
        series, index = place
        self._points[series][index] = self._points[series][index].with_measured(measured)
        self._draw_points()
        if place == self._chosen:
            self._draw_layers()

    def _tell(self, text: str) -> None:
        self._message.value = escape(text)

    def _ipython_display_(self) -> None:
        self._live.refresh()
        # IPython has no types for it.
        display(self.widget)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"Explorer({self._front!r})"


def _ending(name: str, found: Measured | Exception | None) -> str:
    if isinstance(found, Measured):
        return f"Measured {name}: {found}"
    return f"{name} was not measured: {'stopped' if found is None else f'{type(found).__name__}: {found}'}"
