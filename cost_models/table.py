"""What each scheme of each group costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.errors import BudgetError
from mpq.problem import Constraint, Floats, PairCosts
from mpq.space import SearchSpace
from mpq.units import show


@dataclass(frozen=True, eq=False)
class Cost:
    """One metric that adds up over groups, or the largest of several that do.

    Costs are kept in whole numbers where the metric has them (bytes, weight bits), so that sums are exact; the metric
    of a pick is the largest row of ``(sum of cost + constant) / divisor``. One row is a plain sum; peak memory has one
    row for each moment.

    Attributes:
        name: Metric: ``size``, ``avg_bits``, ``stored_bits``, ``bitops``, ``peak_memory``, ...
        unit: Unit of the metric.
        cost: ``[G, S, R]``; ``[G, S]`` is one row.
        constant: What is there whatever is picked; a number, or ``[R]``.
        divisor: Turns the sum into the metric.
        reference: The metric of the float model, for limits in per cent; 0 where it is not known.
        pairs: What neighbours add to a metric of one row.
        notes: What the metric leaves out or takes a guess at, in words.
    """

    name: str
    unit: str
    cost: Floats
    constant: float | Floats
    divisor: float
    reference: float
    pairs: PairCosts | None = None
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> Floats:
        """``[G, S, R]``."""
        return self.cost[..., None] if self.cost.ndim == 2 else self.cost

    def require_sum(self) -> None:
        """Check that the metric is a plain sum.

        Raises:
            BudgetError: If it is the largest of several rows, which can be limited, but not minimized here.
        """
        if self.rows.shape[2] > 1:
            raise BudgetError(f"{self.name} is the largest of {self.rows.shape[2]} sums; set a budget for it instead")

    def total(self, pick: ArrayLike) -> float:
        """The metric of a pick ``[G]``."""
        picks = np.asarray(pick, np.int64)
        between = 0.0 if self.pairs is None else self.pairs.total(picks)
        return self.metric(self.rows[np.arange(len(self.cost)), picks].sum(0) + between)

    def constraint(self, limit: float) -> Constraint:
        """That the metric stays under a limit."""
        limits = np.broadcast_to(limit * self.divisor - self.constant, self.rows.shape[2:]).copy()
        return Constraint(self.name, self.unit, self.cost, limits, self.pairs)

    def cost_floor(self, allowed: NDArray[np.bool_]) -> Floats:
        """Smallest sum of costs over the allowed choices ``[G, S]``, each row on its own ``[R]``."""
        found: Floats = np.where(allowed[..., None], self.rows, np.inf).min(1).sum(0)
        return found

    def cost_ceiling(self, allowed: NDArray[np.bool_]) -> Floats:
        """Largest sum of costs over the allowed choices ``[G, S]``, each row on its own ``[R]``."""
        found: Floats = np.where(allowed[..., None], self.rows, -np.inf).max(1).sum(0)
        return found

    def part(self, group: int, scheme: int, pick: ArrayLike) -> float:
        """What a group with a scheme adds to the metric of a pick: its part of the row that decides."""
        picks = np.asarray(pick, np.int64)
        row = np.argmax(self.rows[np.arange(len(self.cost)), picks].sum(0) + self.constant)
        return float(self.rows[group, scheme, row] / self.divisor)

    def metric(self, cost_sum: float | Floats) -> float:
        """The metric for sums of costs, one number or ``[R]``."""
        return float(np.max((cost_sum + self.constant) / self.divisor))

    def show(self, value: float) -> str:
        """A value of the metric for people, with its share of the float model."""
        share = f" ({value / self.reference:.1%})" if self.reference and self.unit != "bits" else ""
        return self.scaled(value) + share

    def scaled(self, value: float) -> str:
        """A value or a change of the metric with its unit."""
        return show(value, self.unit)


def group_sums(space: SearchSpace, by_layer: Floats) -> Floats:
    """Sums over the layers of each group ``[G, ...]`` of values of the searched layers ``[L, ...]``."""
    ends = np.cumsum([len(g.layers) for g in space.groups])
    return np.stack([part.sum(0) for part in np.split(by_layer, ends[:-1])])
