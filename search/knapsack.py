"""Exact multiple-choice knapsack: least loss under one additive limit, with a certificate, up to millions of groups."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Solution, infeasible, solved, without_groups
from mpq.search.hull import linear_optimum
from mpq.search.pareto import extend_frontier

_ROUNDING = 1e-13  # of the sum of all terms: guards pruning against the rounding of sums
_IN_DOUBT = 60  # groups of the thinned dynamic program that improves the first pick
_BINS = 1500  # its states
_ROUNDS = 4


@dataclass(frozen=True)
class Knapsack:
    """Exact solver for at most one constraint of one row.

    1. Hull sweep: the linear relaxation gives the Lagrange multiplier and a lower bound (Sinha and Zoltners,
       1979), its greedy rounding a first pick.
    2. Core: a dynamic program over the groups whose second best scheme has the least reduced cost, thinned to some
       states, improves the pick (the core of Balas and Zemel, 1980).
    3. Reduced-cost fixing: a scheme whose reduced cost exceeds the gap between the two is in no better pick.
    4. Dynamic programming over what remains; states are pruned by dominance, by the limit and by the gap. When it
       ends, the pick is proven optimal up to the rounding of sums.

    Attributes:
        time_limit: Seconds, after which the best pick and its bound are returned as `FEASIBLE`.
        max_states: Likewise, a limit on the states of the dynamic program.

    Example:
        >>> from mpq.problem import Constraint, Problem
        >>> loss, size = [[0.9, 0.2, 0.0], [0.5, 0.1, 0.0]], [[2, 4, 8], [20, 40, 80]]
        >>> solution = Knapsack().solve(Problem(loss, (Constraint("size", "bits", size, 50),)))
        >>> solution.pick.tolist(), solution.objective, solution.usage["size"].tolist(), solution.status.value
        ([2, 1], 0.1, [48.0], 'optimal')
    """

    time_limit: float = 60.0
    max_states: int = 2_000_000

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem.

        Raises:
            MpqError: If the problem has several constraints or rows, interactions, or costs of pairs.
        """
        started = time.perf_counter()
        if problem.interactions is not None:
            raise MpqError("the knapsack takes no interactions; use the interaction solver")
        if len(problem.constraints) > 1 or any(c.cost.shape[2] > 1 for c in problem.constraints):
            raise MpqError("the knapsack takes one constraint with one row; use the ilp solver")
        if any(c.pairs is not None for c in problem.constraints):
            raise MpqError("the knapsack takes no costs of pairs; use the ilp solver")
        if not len(problem.loss):
            return without_groups(problem, "knapsack")
        name, cost, limit = _single(problem)
        if any((problem.smallest_usage()[c.name] > c.slack_limit).any() for c in problem.constraints):
            return infeasible(problem, time.perf_counter() - started, "knapsack")
        run = _Run(problem, cost, limit)
        for _ in range(_ROUNDS):
            if not run.improve() or time.perf_counter() - started > self.time_limit:
                break
        proven = run.prove(self.max_states, started + self.time_limit)
        prices = {name: run.price} if name else {}
        seconds = time.perf_counter() - started
        return solved(problem, run.pick, run.bound - run.rounding, seconds, "knapsack", prices, proven=proven)


class _Run:
    """One solve.

    Attributes:
        pick: Best pick so far.
        bound: Lower bound of the optimum.
        rounding: By how much sums of floats may be off.
        price: Loss saved per unit of a looser limit.
    """

    def __init__(self, problem: Problem, cost: Floats, limit: float) -> None:
        self._problem, self._cost, self._limit = problem, cost, limit
        self._groups = np.arange(len(cost))
        self.price, self.pick = linear_optimum(problem.loss, cost, limit)
        if not problem.feasible(self.pick):  # by rounding
            self.pick = np.where(problem.allowed, cost, np.inf).argmin(1)
        reduced = problem.loss + self.price * cost
        least = reduced.min(1)
        toll = self.price * limit if self.price else 0.0
        self.bound = float(least.sum()) - toll
        self.rounding = _ROUNDING * (float(np.abs(least).sum()) + abs(toll))
        reduced -= least[:, None]
        self._reduced = reduced
        self._objective = problem.objective(self.pick)

    def improve(self) -> bool:
        """Look for a better pick near the relaxation's optimum; whether one was found."""
        gap = self._gap()
        if gap <= 2 * self.rounding or not self.price:
            return False
        base = self._reduced.argmin(1)
        open_ = self._in_doubt(base, gap)
        added = np.where(self._reduced[open_] <= gap, self._cost[open_] - self._cost[open_, base[open_]][:, None], 0.0)
        reach = np.abs(added).max(1)
        # Large moves first: the small ones then fill the room that is left.
        order = np.argsort(-reach, kind="stable")
        open_ = open_[order]
        reach = np.append(reach[order], 0.0)[1:]
        width = np.minimum(2 * reach, np.cumsum(reach[::-1])[::-1]) + gap / self.price
        cost = np.array([float(self._cost[self._groups, base].sum()) - self._limit])
        regret = np.zeros(1)
        history: list[tuple[Ints, Ints]] = []
        for g, far in zip(open_, width, strict=True):
            schemes = np.flatnonzero(self._reduced[g] <= gap)
            costs = (cost[:, None] + (self._cost[g, schemes] - self._cost[g, base[g]])).ravel()
            regrets = (regret[:, None] + self._reduced[g, schemes]).ravel()
            kept = _thinned(costs, regrets, gap, far)
            cost, regret = costs[kept], regrets[kept]
            parent, choice = np.divmod(kept, len(schemes))
            history.append((parent, schemes[choice]))
        total = np.where(cost <= 0, regret - self.price * cost, np.inf)
        if not len(total) or total.min() >= gap:
            return False
        return self._offer(_traced(base, open_, history, int(total.argmin())))

    def prove(self, max_states: int, deadline: float) -> bool:
        """Dynamic programming over all choices that are left; whether it ended, so that the pick is optimal."""
        if self._gap() <= 2 * self.rounding:
            return True
        gap, cost, reduced = self._gap(), self._cost, self._reduced
        keep = self._problem.allowed & (reduced <= gap)
        keep[self._groups, self.pick] = True
        fixed = keep.argmax(1)
        core = np.flatnonzero(keep.sum(1) > 1)
        # Groups with much to lose first: they prune the most states early.
        core = core[np.argsort(-np.where(keep[core], reduced[core], 0).max(1), kind="stable")]
        least = np.where(keep[core], cost[core], np.inf).min(1)
        most = np.where(keep[core], cost[core], -np.inf).max(1)
        in_core = np.zeros(len(keep), bool)
        in_core[core] = True
        base = float(cost[np.flatnonzero(~in_core), fixed[~in_core]].sum())
        # What the groups still to come take at least and at most; more room than the gap is worth is not left over.
        later_least = np.cumsum(least[::-1])[::-1] - least
        later_most = np.cumsum(most[::-1])[::-1] - most
        room = gap / self.price if self.price else np.inf
        slack = 1e-12 * (abs(base) + float(np.abs(most).sum() + np.abs(least).sum()))
        costs, losses, regret = np.array([base]), np.zeros(1), np.zeros(1)
        history: list[tuple[Ints, Ints]] = []
        for g, at_least, at_most in zip(core, later_least, later_most, strict=True):
            schemes = np.flatnonzero(keep[g])
            costs, losses, regret, parent, choice = extend_frontier(
                costs,
                losses,
                cost[g, schemes],
                self._problem.loss[g, schemes],
                (self._limit - room - at_most - slack, self._limit - at_least + slack),
                (regret, reduced[g, schemes], gap),
            )
            history.append((parent, schemes[choice]))
            if len(costs) > max_states or time.perf_counter() > deadline:
                return False
        for state in np.argsort(losses, kind="stable").tolist():
            pick = _traced(fixed, core, history, state)
            if self._problem.feasible(pick):
                self._offer(pick)
                break
        return True

    def _in_doubt(self, base: Ints, gap: float) -> Ints:
        """Groups whose second best scheme has the least reduced cost."""
        second = self._reduced.copy()
        second[self._groups, base] = np.inf
        second = second.min(1)
        found = np.flatnonzero(second <= gap)
        if len(found) > _IN_DOUBT:
            found = found[np.argpartition(second[found], _IN_DOUBT)[:_IN_DOUBT]]
        return found

    def _gap(self) -> float:
        return max(0.0, self._objective - self.bound) + self.rounding

    def _offer(self, pick: Ints) -> bool:
        """Take a pick if it is feasible and better."""
        objective = self._problem.objective(pick)
        if objective >= self._objective or not self._problem.feasible(pick):
            return False
        self.pick, self._objective = pick, objective
        return True


def _traced(pick: Ints, groups: Ints, history: list[tuple[Ints, Ints]], state: int) -> Ints:
    """The pick with what a state of a dynamic program chose for these groups: parent state and scheme of each."""
    found = pick.copy()
    for g, (parent, choice) in zip(groups[::-1], history[::-1], strict=True):
        found[g], state = choice[state], int(parent[state])
    return found


def _thinned(cost: Floats, regret: Floats, gap: float, width: float) -> Ints:
    """Of the states that may still be better, the least regret of each stretch of cost; costs count from the limit."""
    near = np.flatnonzero((regret <= gap) & (np.abs(cost) <= width))
    if len(near) <= _BINS:
        return near
    near = near[np.argsort(regret[near], kind="stable")]
    _, first = np.unique(np.floor(cost[near] / (2 * width) * _BINS), return_index=True)
    return near[first]


def _single(problem: Problem) -> tuple[str, Floats, float]:
    """Name, cost ``[G, S]`` and limit of the one constraint; without one, nothing costs anything."""
    for c in problem.constraints:
        return c.name, c.cost[..., 0], float(c.slack_limit[0])
    return "", np.zeros_like(problem.loss), np.inf
