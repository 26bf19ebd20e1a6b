"""Exact multiple-choice knapsack: least loss under one additive limit, with a certificate."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Solution, infeasible, solved
from mpq.search.hull import HullSweep, hull_sweep
from mpq.search.pareto import extend_frontier

SLACK = 1e-9  # relative; guards pruning against rounding of sums


@dataclass(frozen=True)
class Knapsack:
    """Exact solver for at most one constraint of one row.

    1. Hull sweep: the linear relaxation gives the Lagrange multiplier and a lower bound (Sinha and Zoltners,
       1979), its greedy rounding a first pick.
    2. Reduced-cost fixing: a scheme whose reduced cost exceeds the gap between the two is in no better pick.
    3. Dynamic programming over the remaining core; states are pruned by dominance, by the limit and by
       the gap. When it ends, the pick is proven optimal.

    Attributes:
        time_limit: Seconds, after which the best pick and its bound are returned as `FEASIBLE`.
        max_states: Likewise, a limit on the states of the dynamic program.
    """

    time_limit: float = 60.0
    max_states: int = 2_000_000

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem.

        Raises:
            MpqError: If the problem has several constraints or rows, or interactions.
        """
        started = time.perf_counter()
        if problem.interactions is not None:
            raise MpqError("the knapsack takes no interactions; use the interaction solver")
        if len(problem.constraints) > 1 or any(c.cost.shape[2] > 1 for c in problem.constraints):
            raise MpqError("the knapsack takes one constraint with one row; use the ilp solver")
        name, cost, limit = _single(problem)
        sweep = hull_sweep(problem.loss, cost)
        if not problem.feasible(sweep.start):
            return infeasible(problem, time.perf_counter() - started, "knapsack")
        incumbent, price = _greedy(problem, sweep, cost, limit)
        prices = {name: price} if name else {}
        reduced = problem.loss + price * cost
        best = reduced.min(1, keepdims=True)
        bound = float(best.sum() - (price * limit if price else 0.0))
        pick = self._core(problem, reduced - best, cost, limit, bound, incumbent, started)
        proven, pick = pick is not None, incumbent if pick is None else pick
        seconds = time.perf_counter() - started
        return solved(problem, pick, bound, seconds, "knapsack", prices, proven=proven)

    def _core(
        self,
        problem: Problem,
        reduced: Floats,
        cost: Floats,
        limit: float,
        bound: float,
        incumbent: Ints,
        started: float,
    ) -> Ints | None:
        """The optimal pick, or None if a limit of time or states was hit."""
        upper = problem.objective(incumbent)
        scale = float(np.abs(problem.loss[problem.allowed]).sum()) + abs(upper)
        gap = max(0.0, upper - bound) + SLACK * scale
        keep = problem.allowed & (reduced <= gap)
        keep[np.arange(len(keep)), incumbent] = True
        fixed = keep.argmax(1)
        core = np.flatnonzero(keep.sum(1) > 1)
        # Groups with much to lose first: they prune the most states early.
        core = core[np.argsort(-np.where(keep, reduced, 0).max(1)[core], kind="stable")]
        least = np.where(keep, cost, np.inf).min(1)
        in_core = np.isin(np.arange(len(keep)), core)
        later_least = np.concatenate([np.cumsum(least[core][::-1])[::-1][1:], [0.0]]) if len(core) else least[:0]
        base = float(cost[np.arange(len(keep)), fixed][~in_core].sum())
        costs, losses, regret = np.array([base]), np.zeros(1), np.zeros(1)
        history: list[tuple[Ints, Ints]] = []
        for g, rest in zip(core, later_least, strict=True):
            schemes = np.flatnonzero(keep[g])
            costs, losses, regret, parent, choice = extend_frontier(
                costs,
                losses,
                cost[g, schemes],
                problem.loss[g, schemes],
                limit - rest,
                (regret, reduced[g, schemes], gap),
            )
            history.append((parent, schemes[choice]))
            if len(costs) > self.max_states or time.perf_counter() - started > self.time_limit:
                return None
        if not len(costs):
            return incumbent  # rounding cut off even the incumbent: nothing beats it
        pick, state = fixed.copy(), int(losses.argmin())
        for g, (parent, choice) in zip(core[::-1], history[::-1], strict=True):
            pick[g], state = choice[state], int(parent[state])
        better = problem.feasible(pick) and problem.objective(pick) < upper
        return pick if better else incumbent


def _single(problem: Problem) -> tuple[str, Floats, float]:
    """Name, cost ``[G, S]`` and limit of the one constraint; without one, nothing costs anything."""
    for c in problem.constraints:
        return c.name, c.cost[..., 0], float(c.slack_limit[0])
    return "", np.zeros_like(problem.loss), np.inf


def _greedy(problem: Problem, sweep: HullSweep, cost: Floats, limit: float) -> tuple[Ints, float]:
    """Rounded relaxation: all moves that fit, steepest first; and the price where the limit cuts the sweep."""
    spent = float(cost[np.arange(len(cost)), sweep.start].sum())
    total = spent + np.cumsum(sweep.added_cost)
    cut = int(np.searchsorted(total, limit, side="right"))
    price = float(sweep.slope[cut]) if cut < len(sweep.slope) else 0.0
    pick = sweep.pick(cut)
    spent = float(total[cut - 1]) if cut else spent
    stuck = np.zeros(len(cost), bool)  # a group whose next move did not fit can't skip it along the hull
    for e in range(cut, len(sweep.slope)):
        g = sweep.group[e]
        if spent + sweep.added_cost[e] > limit:
            stuck[g] = True
        elif not stuck[g]:
            pick[g] = sweep.scheme[e]
            spent += sweep.added_cost[e]
    return (pick if problem.feasible(pick) else sweep.start), price
