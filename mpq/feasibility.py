"""`Feasibility`: what each metric can reach under budgets, and what to loosen where they can't be met."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from mpq.budget import Budget, rounded_up
from mpq.cost_models.table import Cost
from mpq.problem import Problem
from mpq.search.feasibility import least_usage, smallest_relaxation

if TYPE_CHECKING:
    from mpq.analysis import Analysis


@dataclass(frozen=True)
class Reach:
    """One metric.

    Attributes:
        unit: Of all values.
        least: Smallest value of any config; a bound of it for a metric that is the largest of several sums, and with
            conversions where time ran out.
        most: Largest, likewise; with conversions a bound.
        limit: Of its budget, None without one.
        with_others: Smallest value under the budgets of other metrics; None where those can't be met, the metric is the
            largest of several sums or, within the time limit, no config was found.
    """

    unit: str
    least: float
    most: float
    limit: float | None
    with_others: float | None


@dataclass(frozen=True)
class Feasibility:
    """Whether budgets can be met together, and if not, why and what would do.

    Attributes:
        budgets: As the user wrote them.
        metrics: Metric -> what it can reach.
        relaxation: Smallest share by which all limits must rise to be met together; 0 if they can be.
        relaxed: Metric -> its limit then.
        proven: No smaller share would do.
        costs: For units.
    """

    budgets: tuple[str, ...]
    metrics: Mapping[str, Reach]
    relaxation: float
    relaxed: Mapping[str, float]
    proven: bool
    costs: Mapping[str, Cost] = field(repr=False)

    @property
    def feasible(self) -> bool:
        """All budgets can be met together."""
        return self.relaxation == 0

    @property
    def binding(self) -> tuple[str, ...]:
        """Where the budgets can't be met: the metrics whose limit alone is too low, else those of the conflict."""
        if self.feasible:
            return ()
        limited = {m: r for m, r in self.metrics.items() if r.limit is not None}
        alone = tuple(m for m, r in limited.items() if r.limit is not None and r.least > r.limit * (1 + 1e-9))
        return alone or tuple(m for m, r in limited.items() if r.with_others is not None) or tuple(limited)

    @property
    def message(self) -> str:
        """What can't be met, which limit binds, what is the least of every metric, and what would do."""
        if self.feasible:
            return f"{_listed(self.budgets)} can be met"
        show = {m: c.show for m, c in self.costs.items()}
        text = {b.partition("<=")[0]: b for b in self.budgets}
        reach = ", ".join(f"{m} {show[m](r.least)}" for m, r in self.metrics.items())
        parts = []
        for m in self.binding:
            limit, least = self.metrics[m].limit, self.metrics[m].least
            if limit is not None and least > limit * (1 + 1e-9):
                parts.append(f"{text[m]} ({show[m](limit)}) is below the smallest reachable {show[m](least)}")
        start = "; ".join(parts)
        if not parts and len(self.budgets) == 1:
            start = f"{self.budgets[0]} is too low: {', '.join(self._relaxed())} can be met{self._doubt()}"
        elif not parts:
            found = {m: r.with_others for m, r in self.metrics.items() if r.limit is not None}
            others = [f"under the others, {m} reaches {show[m](v)}" for m, v in found.items() if v is not None]
            start = "; ".join([f"{_listed(self.budgets)} can be met alone but not together", *others])
        return (
            f"the budget can't be met: {start}. Smallest reachable: {reach}. Loosen the limit or allow lower bits"
            f"{self._remedy()}"
        )

    def _remedy(self) -> str:
        """The smallest relaxations; limits are rounded up, so that they can be typed as they are."""
        if len(self.relaxed) < 2:
            return ""
        alone = [
            f"only {rounded_up(m, r.with_others)}"
            for m, r in self.metrics.items()
            if r.limit is not None and r.with_others is not None and r.with_others > r.limit
        ]
        every = f"all limits by {self.relaxation:.2%} ({', '.join(self._relaxed())}){self._doubt()}"
        return f"; smallest relaxation: {', or '.join([*alone, every])}"

    def _relaxed(self) -> list[str]:
        return [rounded_up(m, v) for m, v in self.relaxed.items()]

    def _doubt(self) -> str:
        return "" if self.proven else ", not proven smallest"

    def to_json(self) -> str:
        """All of it but the costs."""
        data = {
            "schema": "mpq/feasibility-1",
            "budgets": list(self.budgets),
            "feasible": self.feasible,
            "binding": list(self.binding),
            "metrics": {m: asdict(r) for m, r in self.metrics.items()},
            "relaxation": self.relaxation,
            "relaxed": dict(self.relaxed),
            "proven": self.proven,
        }
        return json.dumps(data, indent=1, allow_nan=False) + "\n"

    def __repr__(self) -> str:
        width = max(map(len, self.metrics))
        lines = [f"Feasibility: {self.message}"]
        for m, r in self.metrics.items():
            show = self.costs[m].scaled
            parts = [f"reachable {show(r.least)} to {show(r.most)}"]
            parts += [] if r.limit is None else [f"limit {show(r.limit)}"]
            if r.with_others is not None and r.with_others > r.least:
                parts.append(f"at least {show(r.with_others)} under the other budgets")
            lines.append(f"  {m:<{width}}  {', '.join(parts)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{escape(repr(self))}</pre>"


def make_feasibility(analysis: Analysis, budgets: tuple[Budget, ...], time_limit: float = 60.0) -> Feasibility:
    """The feasibility of budgets.

    Args:
        analysis: What is known of the model.
        budgets: At least one.
        time_limit: Seconds for each of the problems solved: one for all budgets, one for each metric.

    Raises:
        BudgetError: If a metric has no cost model here.
    """
    problem = analysis.problem(budgets)
    limits = {b.metric: b.limit(analysis.cost(b.metric).reference) for b in budgets}
    units = {m: abs(v) * analysis.costs[m].divisor for m, v in limits.items()}
    found = smallest_relaxation(problem, units, time_limit)
    relaxed = {m: v * (1 + found.share) for m, v in limits.items()}
    reach = {}
    for m, cost in analysis.costs.items():
        others = None
        if set(limits) - {m} and cost.rows.shape[2] == 1:
            every = (*(c for c in problem.constraints if c.name != m), cost.constraint(math.inf))
            pick = least_usage(Problem(problem.loss, every), m, time_limit).pick
            others = None if pick is None else cost.total(pick)
        low, high = _range(problem, cost, time_limit)
        reach[m] = Reach(cost.unit, low, high, limits.get(m), others)
    return Feasibility(tuple(b.text for b in budgets), reach, found.share, relaxed, found.proven, analysis.costs)


def _range(problem: Problem, cost: Cost, time_limit: float) -> tuple[float, float]:
    """Least and most of a metric, whatever the budgets."""
    low, high = cost.cost_floor(problem.allowed), cost.cost_ceiling(problem.allowed)
    if cost.pairs is not None:
        free = Problem(problem.loss, (cost.constraint(math.inf),))
        low, high = np.maximum(low, least_usage(free, cost.name, time_limit).bound), high + cost.pairs.largest
    return cost.metric(low), cost.metric(high)


def _listed(texts: tuple[str, ...]) -> str:
    return " and ".join(texts)
