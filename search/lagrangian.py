"""Lagrangian relaxation of several limits at once: a lower bound, dual prices and a feasible pick.

Pricing the rows of all constraints into the loss leaves a choice that each group makes alone. For any prices that are
not negative, the sum of these least priced losses minus the price of the limits is a lower bound; the prices with the
largest bound are the dual prices of the linear relaxation (Everett, 1963; Geoffrion, 1974). The bound is concave and
piecewise linear in the prices, and is raised by cutting planes in a box around the best prices so far, which grows or
shrinks with success (Marsten, Hogan and Blankenship, 1975).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import highspy
import numpy as np

from mpq.problem import Floats
from mpq.search.hull import hull_sweep

_ITERATIONS = 300
_PRECISION = 1e-9  # of the loss above the least: a smaller possible gain ends the search for prices
_SAMPLE = 2000  # groups that give the first prices of a larger problem
_MAX_CUTS = 60
_ROUNDING = 1e-13  # of the sum of all terms


@dataclass(frozen=True, eq=False)
class LagrangianBound:
    """A lower bound and what it comes from.

    Attributes:
        bound: Proven lower bound of the total loss; infinite if the limits can't be met together.
        prices: Loss per unit of each row, not negative ``[R]``.
        reduced: What each choice adds to the bound, not negative ``[G, S]``; infinite where not allowed.
        rounding: By how much sums of floats may be off.
    """

    bound: float
    prices: Floats
    reduced: Floats
    rounding: float


def relax(loss: Floats, cost: Floats, limit: Floats, deadline: float = np.inf) -> LagrangianBound:
    """Prices with the largest bound.

    Args:
        loss: ``[G, S]``, infinite where not allowed.
        cost: ``[G, S, R]``.
        limit: ``[R]``, finite.
        deadline: Value of ``time.perf_counter()`` at which the best prices so far are taken.
    """
    if not len(limit):
        return _relaxation(loss, cost, limit, np.zeros(0))
    # From the least of each row and in units of its span, so that sums are of the size of what is decided.
    least = np.where(np.isfinite(loss)[..., None], cost, np.inf).min(1)
    cost, limit = cost - least[:, None], limit - least.sum(0)
    span = cost.max(1).sum(0)
    span[span == 0] = 1.0
    cost, limit = cost / span, limit / span
    start = None
    if len(loss) > _SAMPLE:
        step = -(-len(loss) // _SAMPLE)
        part = cost[::step]
        start = _Dual(loss[::step], part, limit * part.max(1).sum(0)).climb(None, deadline)
    found = _relaxation(loss, cost, limit, _Dual(loss, cost, limit).climb(start, deadline))
    return replace(found, prices=found.prices / span)


def _relaxation(loss: Floats, cost: Floats, limit: Floats, prices: Floats) -> LagrangianBound:
    reduced = loss + cost @ prices
    least = reduced.min(1, keepdims=True)
    toll = float(prices @ limit)
    rounding = _ROUNDING * (float(np.abs(least).sum()) + float(prices @ np.abs(limit)))
    bound = float(least.sum()) - toll
    worst = np.where(np.isfinite(loss), loss, -np.inf).max(1).sum()
    if bound > worst + rounding + 1e-9 * abs(worst):  # no pick costs as much as this bound
        bound = np.inf
    reduced -= least
    return LagrangianBound(bound, prices, reduced, rounding)


class _Dual:
    """The bound as a function of the prices, and its cutting planes."""

    def __init__(self, loss: Floats, cost: Floats, limit: Floats) -> None:
        self._loss, self._cost, self._limit = loss, cost, limit
        self._groups = np.arange(len(loss))
        self._floor = float(loss.min(1).sum())
        finite = np.where(np.isfinite(loss), loss, -np.inf).max(1)
        self._worst = float(finite.sum())
        self._intercepts: list[float] = []
        self._slopes: list[Floats] = []

    def value(self, prices: Floats) -> tuple[float, Floats]:
        """The bound at some prices and its slope ``[R]``; both are kept as a cutting plane."""
        pick = (self._loss + self._cost @ prices).argmin(1)
        slope = self._cost[self._groups, pick].sum(0) - self._limit
        intercept = float(self._loss[self._groups, pick].sum())
        self._intercepts.append(intercept)
        self._slopes.append(slope)
        return intercept + float(slope @ prices), slope

    def climb(self, start: Floats | None, deadline: float) -> Floats:
        """Prices with the largest bound that is found."""
        prices = self._one_by_one() if start is None else start
        best, _ = self.value(prices)
        # The unit of a price: itself, or where it is zero, some of the loss above the least for the row's whole span.
        unit = np.maximum(prices, 1e-3 * max(best - self._floor, 1e-12 * (self._worst - self._floor), 1e-30))
        radius = 0.3 if start is None else 0.05
        for _ in range(_ITERATIONS):
            if time.perf_counter() > deadline or best > self._worst + 1e-6 * abs(self._worst):
                break
            promised, step = self._master(prices, best, radius * unit)
            if promised <= _PRECISION * max(best - self._floor, 0.0):
                on_edge = bool((np.abs(step) > 0.999).any())
                if not on_edge or promised <= 0:
                    break
            trial = np.maximum(prices + step * radius * unit, 0.0)
            found, _ = self.value(trial)
            if found > best + 0.1 * promised:
                if (np.abs(step) > 0.999).any():
                    radius *= 3
                prices = trial
                unit = np.maximum(unit, trial)
            elif found > best:
                prices = trial
            else:
                radius = max(radius / 2, 1e-12)
            best = max(best, found)
            self._forget(prices)
        return prices

    def _one_by_one(self) -> Floats:
        """First prices: the best of each row, one after the other, twice."""
        R = len(self._limit)
        prices = np.zeros(R)
        for r in [*range(R)] * min(R, 2):
            prices[r] = 0.0
            sweep = hull_sweep(self._loss + self._cost @ prices, self._cost[..., r])
            spent = self._cost[self._groups, sweep.start, r].sum() + np.cumsum(sweep.added_cost)
            cut = int(np.searchsorted(spent, self._limit[r], side="right"))
            prices[r] = sweep.slope[cut] if cut < len(sweep.slope) else 0.0
        return prices

    def _master(self, prices: Floats, best: float, width: Floats) -> tuple[float, Floats]:
        """The largest gain that the cutting planes allow in a box, and where, in widths of the box ``[R]``."""
        slopes = np.array(self._slopes) * width
        gains = np.array(self._intercepts) + np.array(self._slopes) @ prices - best
        scale = max(float(np.abs(slopes).max()), 1e-300)
        K, R = slopes.shape
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = R + 1, K
        lp.sense_ = highspy.ObjSense.kMaximize
        lp.col_cost_ = np.r_[np.zeros(R), 1.0]
        lp.col_lower_ = np.r_[np.maximum(-1.0, -prices / width), -np.inf]
        lp.col_upper_ = np.r_[np.ones(R), np.inf]
        lp.row_lower_ = np.full(K, -np.inf)
        lp.row_upper_ = gains / scale
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.arange(K + 1) * (R + 1)
        lp.a_matrix_.index_ = np.tile(np.arange(R + 1), K)
        lp.a_matrix_.value_ = np.c_[-slopes / scale, np.ones(K)].ravel()
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("dual_feasibility_tolerance", 1e-10)
        solver.setOptionValue("primal_feasibility_tolerance", 1e-10)
        solver.passModel(lp)
        solver.run()
        found = np.array(solver.getSolution().col_value)
        if len(found) != R + 1:
            return 0.0, np.zeros(R)
        return float(found[-1]) * scale, found[:-1]

    def _forget(self, prices: Floats) -> None:
        """Keep the planes that are lowest at the prices."""
        if len(self._slopes) > _MAX_CUTS + 20:
            gains = np.array(self._intercepts) + np.array(self._slopes) @ prices
            keep = np.sort(np.argsort(gains, kind="stable")[:_MAX_CUTS])
            self._intercepts = [self._intercepts[k] for k in keep]
            self._slopes = [self._slopes[k] for k in keep]
