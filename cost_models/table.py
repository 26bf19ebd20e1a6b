"""What each scheme of each group costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.problem import Constraint, Floats
from mpq.units import show


@dataclass(frozen=True, eq=False)
class Cost:
    """One metric that adds up over groups.

    Costs are kept in whole numbers where the metric has them (bytes, weight bits), so that sums are exact; the metric
    of a pick is ``(sum of cost + constant) / divisor``.

    Attributes:
        name: Metric: ``size``, ``avg_bits``, ``stored_bits``, ``bitops``.
        unit: Unit of the metric.
        cost: ``[G, S]``.
        constant: What is there whatever is picked.
        divisor: Turns the sum into the metric.
        reference: The metric of the float model, for limits in per cent.
    """

    name: str
    unit: str
    cost: Floats
    constant: float
    divisor: float
    reference: float

    def total(self, pick: ArrayLike) -> float:
        """The metric of a pick ``[G]``."""
        picks = np.asarray(pick, np.int64)
        return float((self.cost[np.arange(len(self.cost)), picks].sum() + self.constant) / self.divisor)

    def constraint(self, limit: float) -> Constraint:
        """That the metric stays under a limit."""
        return Constraint(self.name, self.unit, self.cost, np.array([limit * self.divisor - self.constant]))

    def cost_floor(self, allowed: NDArray[np.bool_]) -> float:
        """Smallest sum of costs over the allowed choices ``[G, S]``."""
        return float(np.where(allowed, self.cost, np.inf).min(1).sum())

    def cost_ceiling(self, allowed: NDArray[np.bool_]) -> float:
        """Largest sum of costs over the allowed choices ``[G, S]``."""
        return float(np.where(allowed, self.cost, -np.inf).max(1).sum())

    def metric(self, cost_sum: float) -> float:
        """The metric for a sum of costs."""
        return (cost_sum + self.constant) / self.divisor

    def show(self, value: float) -> str:
        """A value of the metric for people, with its share of the float model."""
        share = f" ({value / self.reference:.1%})" if self.reference and self.unit != "bits" else ""
        return self.scaled(value) + share

    def scaled(self, value: float) -> str:
        """A value or a change of the metric with its unit."""
        return show(value, self.unit)
