"""The points of an explorer and the axes they can be drawn on. No widgets in here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mpq.analysis import Analysis
from mpq.config import BitConfig, Measured
from mpq.errors import ConfigError, MpqError
from mpq.problem import Ints
from mpq.units import show
from mpq.viz.plots import LOSSES

if TYPE_CHECKING:
    from mpq.frontier import Frontier

Given = BitConfig | Mapping[str, float]

_LABELS = {
    "avg_bits": "average weight bits",
    "stored_bits": "stored weight bits",
    "bitops": "BitOps",
    "peak_memory": "peak memory",
}
_SYMBOLS = {"bytes": "B", "s": "s", "J": "J"}
_IN_A_LINE = ("size", "avg_bits", "bitops", "latency", "energy")
_MEASURED = ("accuracy", "kl", "mse")


@dataclass(frozen=True)
class Axis:
    """What an axis shows.

    Attributes:
        key: Of the values of points.
        label: Title.
        unit: Of the values.
        log: Logarithmic.
    """

    key: str
    label: str
    unit: str
    log: bool = False

    @property
    def ticks(self) -> dict[str, str]:
        """How Plotly writes its numbers."""
        if self.log:
            return {"tickformat": "", "ticksuffix": ""}
        formats = {"bits": ".3~f", "%": ".1%"}
        return {"tickformat": formats.get(self.unit, "~s"), "ticksuffix": _SYMBOLS.get(self.unit, "")}


@dataclass(frozen=True, eq=False)
class Point:
    """One point of an explorer.

    Attributes:
        name: For people.
        values: Axis -> value; what is not known is absent.
        schemes: How many layers have which scheme, in words.
        pick: Scheme index of each group ``[G]``; None where it is no pick of the search space.
        given: The user's config, which is saved as it is.
        measured: What was measured.
    """

    name: str
    values: Mapping[str, float]
    schemes: str = ""
    pick: Ints | None = None
    given: BitConfig | None = field(default=None, repr=False)
    measured: Measured | None = None

    def config(self, analysis: Analysis) -> BitConfig | None:
        """Its config with what was measured; None where only figures are known."""
        config = self.given
        if config is None and self.pick is not None:
            config = analysis.config(self.pick)
        return config if config is None or self.measured is None else config.with_measured(self.measured)

    def with_measured(self, measured: Measured) -> Point:
        """The same point with measured figures."""
        found = {key: getattr(measured, key) for key in _MEASURED}
        values = {**self.values, **{key: value for key, value in found.items() if value is not None}}
        return replace(self, values=values, measured=measured)

    def line(self, axes: Mapping[str, Axis], reference: Mapping[str, float]) -> str:
        """All that is known of it in one line.

        Args:
            axes: What its values are.
            reference: The float model's metrics.
        """
        parts = []
        for key in _IN_A_LINE:
            if key in self.values:
                value, unit = self.values[key], axes[key].unit
                share = f" ({value / reference[key]:.1%})" if key == "size" else ""
                parts.append(f"{show(value, unit)}{share}")
        if "loss" in self.values:
            parts.append(f"predicted loss {self.values['loss']:.3g}")
        if "accuracy" in self.values:
            parts.append(f"measured accuracy {self.values['accuracy']:.2%}")
        return ", ".join([*parts, self.schemes] if self.schemes else parts)


def axes_of(front: Frontier) -> dict[str, Axis]:
    """Key -> axis: the metrics that the configs hold, predicted loss, and what can be measured."""
    rows = front.analysis.metrics(front.picks[0], [front.metric])
    axes = {metric: Axis(metric, _LABELS.get(metric, metric), row["unit"]) for metric, row in rows.items()}
    loss = str(front.analysis.provenance["loss"])
    divergence = "mse" if loss == "mse" else "kl"
    axes["loss"] = Axis("loss", f"predicted rise of {LOSSES.get(loss, loss)}", "", log=True)
    axes["accuracy"] = Axis("accuracy", "measured accuracy", "%")
    axes[divergence] = Axis(divergence, f"measured {LOSSES[divergence]}", "", log=True)
    return axes


def frontier_points(front: Frontier) -> list[Point]:
    """The points of the frontier, by rising cost."""
    return [_from_pick(front, f"front[{i}]", pick) for i, pick in enumerate(front.picks)]


def uniform_points(front: Frontier) -> list[Point]:
    """Each scheme in all layers that may have it."""
    configs = {f"uniform {s}": front.analysis.uniform(s) for s in front.analysis.space.uniform_schemes}
    return [_from_pick(front, name, pick_of(front.analysis, config)) for name, config in configs.items()]


def given_points(front: Frontier, points: Mapping[str, Given]) -> list[Point]:
    """Configs and published figures by name.

    Raises:
        MpqError: If figures are not finite numbers, or on no axis.
    """
    if not isinstance(points, Mapping) or not all(isinstance(p, BitConfig | Mapping) for p in points.values()):
        raise MpqError("points maps names to configs, or to metrics such as {'size': 120e3, 'accuracy': 0.91}")
    return [
        _from_config(front, name, given) if isinstance(given, BitConfig) else _from_figures(front, name, given)
        for name, given in points.items()
    ]


def pick_of(analysis: Analysis, config: BitConfig) -> Ints | None:
    """The pick that a config is; None if it is of another model or has what is not open to the search."""
    try:
        return analysis.pick(config)
    except ConfigError:
        return None


def _from_pick(front: Frontier, name: str, pick: Ints | None) -> Point:
    assert pick is not None
    analysis = front.analysis
    metrics = analysis.metrics(pick, [front.metric])
    values = {metric: float(row["value"]) for metric, row in metrics.items()} | {"loss": analysis.table.predict(pick)}
    names = [str(s) for s in analysis.space.schemes]
    counts: Counter[str] = Counter()
    for group, s in zip(analysis.space.groups, pick.tolist(), strict=True):
        counts[names[s]] += len(group.layers)
    return Point(name, values, _counted(counts, names), pick)


def _from_config(front: Frontier, name: str, config: BitConfig) -> Point:
    """Predicted anew where the analysis knows its layers, so that it compares with the frontier."""
    pick = pick_of(front.analysis, config)
    if pick is not None:
        point = replace(_from_pick(front, name, pick), given=config)
    else:
        joint = config.predicted["with_interactions"]
        metrics = {metric: float(row["value"]) for metric, row in config.metrics.items()}
        values = {k: v for k, v in metrics.items() if k in axes_of(front)}
        values["loss"] = config.predicted_loss if joint is None else joint
        counts = Counter(config.schemes().values())
        point = Point(name, values, _counted(counts, sorted(counts)), None, config)
    return point if config.measured is None else point.with_measured(config.measured)


def _from_figures(front: Frontier, name: str, figures: Mapping[str, float]) -> Point:
    known = axes_of(front)
    unknown = next((key for key in figures if key not in known), None)
    if unknown is not None:
        raise MpqError(f"point {name!r} has {unknown!r}, which is on no axis here; there are {', '.join(known)}")
    try:
        values = {key: float(value) for key, value in figures.items()}
        if not values or not all(map(math.isfinite, values.values())):
            raise ValueError
        return Point(name, values)
    except (TypeError, ValueError):
        raise MpqError(f"point {name!r} must hold numbers in the units of the metrics, not {dict(figures)}") from None


def _counted(counts: Mapping[str, int], order: list[str]) -> str:
    return ", ".join(f"{counts[name]} x {name}" for name in order if counts.get(name))
