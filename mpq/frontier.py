"""`Frontier`: all best trade-offs between predicted loss and one cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from mpq._lazy import require
from mpq.analysis import Analysis, Budgets
from mpq.config import BitConfig
from mpq.cost_models.table import Cost
from mpq.errors import MpqError
from mpq.files import write_text
from mpq.problem import Floats, Ints, Problem
from mpq.search import FrontierPicks, convex_frontier, exact_frontier, interaction_frontier
from mpq.search.interaction import solver_for
from mpq.search.pareto import undominated
from mpq.units import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mpq.viz.explorer import Explorer
    from mpq.viz.explorer_measuring import Evaluate
    from mpq.viz.explorer_points import Given

# Where conversions between neighbours count, each limit is a problem of its own.
_PAIR_LIMITS, _PAIR_SECONDS = 24, 1.0


@dataclass(frozen=True, eq=False)
class Frontier(Sequence[BitConfig]):
    """Configs that no other dominates, by rising cost.

    ``front[i]`` is a `BitConfig`; ``front.at("size<=30%")`` solves any budget, also between the points.

    Attributes:
        analysis: What it was made from.
        metric: The cost on the horizontal axis.
        unit: Its unit.
        cost: Metric of each point ``[P]``, rising.
        loss: Predicted loss of each point ``[P]``, falling.
        picks: Scheme index per group of each point ``[P, G]``.
        exact: True if the points come from all trade-offs there are (perhaps thinned, see `total`); False if they are
            those of the convex hull or, with interactions or conversions, the best that were found.
        total: How many points the frontier has before thinning.
        interacting: The loss counts interactions between layers.
        converting: The cost counts conversions between layers.
    """

    analysis: Analysis = field(repr=False)
    metric: str
    unit: str
    cost: Floats
    loss: Floats
    picks: Ints
    exact: bool
    total: int
    interacting: bool = False
    converting: bool = False

    @property
    def kind(self) -> str:
        """``exact``, ``convex``, ``interaction-aware`` or ``conversion-aware``."""
        if self.interacting:
            return "interaction-aware"
        return "exact" if self.exact else "conversion-aware" if self.converting else "convex"

    def __len__(self) -> int:
        return len(self.picks)

    @overload
    def __getitem__(self, index: int) -> BitConfig: ...
    @overload
    def __getitem__(self, index: slice) -> list[BitConfig]: ...
    def __getitem__(self, index: int | slice) -> BitConfig | list[BitConfig]:
        if isinstance(index, slice):
            return [self.analysis.config(pick) for pick in self.picks[index]]
        return self.analysis.config(self.picks[index])

    def __iter__(self) -> Iterator[BitConfig]:
        return (self.analysis.config(pick) for pick in self.picks)

    def at(self, budget: Budgets) -> BitConfig:
        """The config with the least predicted loss under budgets: solved anew, nothing is measured again.

        Raises:
            BudgetError: If a budget does not parse or can't be reached.
        """
        return self.analysis.allocate(budget)

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw it with matplotlib; see `mpq.viz.plot_frontier` for the options."""
        from mpq.viz import plot_frontier

        return plot_frontier(self, ax, **options)

    def explore(self, points: Mapping[str, Given] | None = None, evaluate: Evaluate | None = None) -> Explorer:
        """Explore it in a notebook (VS Code, JupyterLab, Colab): an interactive plot with the layers of each point.

        Needs ``mpq[explore]``. Both axes switch between the metrics that the configs hold (`Analysis.on` a device adds
        latency and energy), predicted loss, and measured accuracy and divergence. A click on a point shows the bits,
        runner-up and price of each layer; buttons save the config as JSON and measure it. ``explorer.config`` is the
        chosen one.

        Args:
            points: Name -> a config of your own, or metrics of a published one in the units of the axes, such as
                ``{"size": 120e3, "accuracy": 0.91}``.
            evaluate: What measures a config: a `mpq.Evaluator`, or a function of a `BitConfig` that returns `Measured`.
                It runs in the background.

        Raises:
            MpqError: If a package is missing, or a point has figures for no axis.
        """
        require(("plotly", "anywidget", "ipywidgets"), "explore")
        from mpq.viz.explorer import Explorer

        if evaluate is not None and not callable(evaluate) and not hasattr(evaluate, "measure"):
            raise MpqError(f"evaluate must be mpq.Evaluator(model, labelled_batches), not {type(evaluate).__name__}")
        return Explorer(self, points or {}, evaluate)

    def to_json(self) -> str:
        """Metric, unit and all points with their schemes by layer."""
        points = [
            {"cost": c, "loss": x, "schemes": cfg.schemes()}
            for c, x, cfg in zip(self.cost.tolist(), self.loss.tolist(), self, strict=True)
        ]
        data = {
            "schema": "mpq/frontier-1",
            "metric": self.metric,
            "unit": self.unit,
            "exact": self.exact,
            "interactions": self.interacting,
            "conversions": self.converting,
            "total": self.total,
            "points": points,
            "provenance": dict(sorted(self.analysis.provenance.items())),
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write the JSON file."""
        return write_text(path, self.to_json())

    def _kind(self) -> str:
        thinned = f", thinned from {self.total:,}" if self.total > len(self) else ""
        return f"{len(self)} points of the {self.kind} frontier{thinned}"

    def __repr__(self) -> str:
        rows = [f"Frontier: {self._kind()}, predicted {self.analysis.provenance['loss']} rise against {self.metric}"]
        for i in np.unique(np.linspace(0, len(self) - 1, 9).astype(int)):
            cost = si(self.cost[i], self.unit) if self.unit in ("s", "J") else f"{self.cost[i]:,.6g} {self.unit}"
            rows.append(f"  [{i:>4}] {self.metric} {cost:>16}   loss {self.loss[i]:.5g}")
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def make_frontier(analysis: Analysis, cost: Cost, max_points: int = 400) -> Frontier:
    """The frontier of an analysis over one cost.

    Without interactions it is exact if it is small enough, else its convex hull. With interactions, local search
    improves those points and the ones that are dominated then are dropped.

    Args:
        analysis: What is known of the model.
        cost: The cost on the horizontal axis.
        max_points: Thin a longer frontier to about this many points; the points of its hull all stay.

    Raises:
        BudgetError: If the cost is the largest of several rows.
    """
    cost.require_sum()
    problem = analysis.problem()
    interacting = problem.interactions is not None and bool(problem.interactions.any())
    if _converting(cost):
        return _frontier(analysis, cost, _with_pairs(analysis, cost, max_points), interacting)
    hull = convex_frontier(problem.loss, cost.rows[..., 0])
    found = exact_frontier(problem.loss, cost.rows[..., 0]) or hull
    if interacting:
        found = _interacting(analysis, problem, cost, found)
    keep = np.arange(len(found.cost))
    if len(keep) > max_points and (found.exact or interacting):
        # Evenly along the cost axis, so that no stretch of it is left empty.
        keep = np.searchsorted(found.cost, np.linspace(found.cost[0], found.cost[-1], max_points))
        on_hull = np.flatnonzero(np.isin(found.cost, hull.cost)) if found.exact else keep[:0]
        keep = np.union1d(keep, on_hull)
    points = len(found.cost)
    kept = FrontierPicks(found.picks[keep], found.cost[keep], found.loss[keep], found.exact)
    return _frontier(analysis, cost, kept, interacting, points)


def _frontier(
    analysis: Analysis, cost: Cost, found: FrontierPicks, interacting: bool, points: int | None = None
) -> Frontier:
    metric = np.array([cost.metric(c) for c in found.cost])
    points = len(metric) if points is None else points
    facts = found.exact, points, interacting, _converting(cost)
    return Frontier(analysis, cost.name, cost.unit, metric, found.loss, found.picks, *facts)


def _converting(cost: Cost) -> bool:
    return cost.pairs is not None and bool(cost.pairs.cost.any())


def _with_pairs(analysis: Analysis, cost: Cost, max_points: int) -> FrontierPicks:
    """Best picks at limits along the frontier that leaves the costs of pairs out; each limit is solved with them."""
    assert cost.pairs is not None
    blind = make_frontier(analysis, replace(cost, pairs=None), max_points)
    problem, tried = analysis.problem(), list(blind.picks)
    totals = [cost.total(p) for p in tried]
    for limit in np.linspace(min(totals), max(totals), _PAIR_LIMITS):
        limited = replace(problem, constraints=(cost.constraint(float(limit)),))
        pick = solver_for(limited, _PAIR_SECONDS).solve(limited).pick
        tried += [] if pick is None else [pick]
    picks = np.unique(np.array(tried), axis=0)
    sums = np.array([cost.total(p) * cost.divisor - cost.constant for p in picks])
    loss = analysis.table.predict_all(picks)
    kept = undominated(np.c_[sums, loss])
    return FrontierPicks(picks[kept], sums[kept], loss[kept], exact=False)


def _interacting(analysis: Analysis, problem: Problem, cost: Cost, starts: FrontierPicks) -> FrontierPicks:
    """The frontier with interactions, its losses as the table predicts them: saturated and never negative."""
    found = interaction_frontier(problem, cost.rows[..., 0], starts)
    loss = analysis.table.predict_all(found.picks)
    kept = undominated(np.c_[found.cost, loss])
    return FrontierPicks(found.picks[kept], found.cost[kept], loss[kept], exact=False)
