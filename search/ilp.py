"""Several constraints at once: Lagrangian relaxation, reduced-cost fixing, and an integer program for the rest."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.errors import MpqError
from mpq.problem import Ints, Problem, Solution, Status, infeasible, solved, without_groups
from mpq.search.core import Core
from mpq.search.lagrangian import relax
from mpq.search.linearized import dual_prices
from mpq.search.repair import Repair
from mpq.search.rows import binding_pairs, binding_rows, fitting, named_prices

_MAX_CUTS = 100
_PATIENCE = 10.0  # seconds for a first pick, beyond the time limit
_FIT_UNIT = 10.0  # a unit of the objective at most this many times the excess found is small enough
_REPAIRS = 5  # first picks where pairs have costs
_FIRST_CORES = (30, 100)  # groups of the integer programs that only seek a better pick
_NODES = 500  # of each of those; they end there and not by the clock, unless time is short


@dataclass(frozen=True)
class Ilp:
    """Exact solver for any number of constraints and rows.

    1. Lagrangian relaxation of all rows (`mpq.search.lagrangian`): a lower bound, dual prices, and by greedy repair a
       feasible pick. Where that finds none, HiGHS looks for any pick, whatever its loss.
    2. Reduced-cost fixing: a choice that adds more to the bound than the gap is in no better pick. Small integer
       programs over the groups that are most in doubt narrow the gap, and so fix more.
    3. The choices that are left go to HiGHS. When it ends, the pick is proven optimal.

    A pick that violates a limit by HiGHS's tolerance is cut off and the program solved again. As HiGHS's tolerances are
    absolute, the objective is in units of the gap: `OPTIMAL` holds within about 1e-6 of it.

    Costs of pairs (`mpq.problem.PairCosts`) are never negative, so that relaxing them away keeps the bound; in the
    integer programs they are exact.

    Attributes:
        time_limit: Seconds; after that the best pick found is returned as `FEASIBLE` with its bound. A feasible answer
            matters more than the limit: as long as there is none, the search for a first one goes on, for 10 seconds
            more at most.
        seed: Random seed of HiGHS.

    Example:
        >>> from mpq.problem import Constraint, Problem
        >>> loss, size, time = [[0.9, 0.2, 0.0], [0.5, 0.1, 0.0]], [[2, 4, 8], [20, 40, 80]], [[1, 1, 3], [2, 2, 5]]
        >>> limits = Constraint("size", "bits", size, 50), Constraint("latency", "ms", time, 4)
        >>> solution = Ilp().solve(Problem(loss, limits))
        >>> solution.pick.tolist(), solution.gap, solution.status.value
        ([1, 1], 0.0, 'optimal')
    """

    time_limit: float = 60.0
    seed: int = 0

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem.

        Raises:
            MpqError: If the problem has interactions.
        """
        started = time.perf_counter()
        if problem.interactions is not None:
            raise MpqError("the ilp takes no interactions; use the interaction solver")
        if not len(problem.loss):
            return without_groups(problem, "ilp")
        run = _Run(problem, started + self.time_limit, self.seed)
        status = run.solve()
        seconds = time.perf_counter() - started
        if run.pick is not None:
            pairs = any(c.pairs is not None for c in problem.constraints)
            prices = (
                dual_prices(problem, run.pick, started + self.time_limit)
                if pairs
                else named_prices(problem, run.prices)
            )
            return solved(problem, run.pick, run.bound, seconds, "ilp", prices, proven=status is Status.OPTIMAL)
        if status is Status.INFEASIBLE:
            return infeasible(problem, seconds, "ilp")
        if status is Status.NO_SOLUTION:
            message = f"no pick found within {seconds:.3g} s, which proves nothing; raise the time limit"
        else:
            message = "HiGHS finds only picks that violate a limit by its tolerance; loosen the limit slightly"
        return Solution(Status.NO_SOLUTION, None, np.inf, -np.inf, {}, seconds, "ilp", {}, message)


class _Run:
    """One solve.

    Attributes:
        pick: Best pick so far, or None.
        bound: Lower bound of the optimum.
        prices: Of the binding rows ``[R]``.
    """

    def __init__(self, problem: Problem, deadline: float, seed: int) -> None:
        self._problem, self._deadline, self._seed = problem, deadline, seed
        self._groups = np.arange(len(problem.loss))
        self._cost, self._limit = binding_rows(problem)
        self._pairs = binding_pairs(problem)
        self._allowed = fitting(problem.allowed, self._cost, self._limit)
        self._loss = np.where(self._allowed, problem.loss, np.inf)
        self.bound = np.inf
        if self._allowed.any(1).all():
            self._relaxed = relax(self._loss, self._cost, self._limit, deadline)
            self._base = self._relaxed.reduced.argmin(1)
            self.prices, self.bound = self._relaxed.prices, self._relaxed.bound - self._relaxed.rounding
        self.pick: Ints | None = None
        self._objective = np.inf
        self._cuts: list[Ints] = []

    def solve(self) -> Status:
        """Improve the pick until time is up or there is a proof: `OPTIMAL` or `INFEASIBLE`."""
        if np.isinf(self.bound):
            return Status.INFEASIBLE
        self._repaired()
        if self.pick is None:
            status = self._any()
            if self.pick is None:
                return status
        for count in _FIRST_CORES:
            if self._remaining() <= 0:
                break
            keep = self._left()
            if (keep.sum(1) > 1).sum() > 2 * count:
                core = self._most_in_doubt(keep, count)
                _, pick, _ = self._run(core, self._gap(), self._remaining() / 10, _NODES)
                self._offer(pick)
        return self._prove()

    def _repaired(self) -> None:
        """First picks. With pair costs, what those of the last pick take is left free, and uniform picks are tried."""
        relaxed, limit = self._relaxed, self._limit.copy()
        for _ in range(_REPAIRS if self._pairs else 1):
            pick = Repair(self._loss, self._cost, limit, relaxed.reduced, relaxed.prices, self._deadline).best()
            if pick is None or self._problem.feasible(pick):
                self._offer(pick)
                break
            for row, pairs in self._pairs:
                limit[row] = min(limit[row], self._limit[row] - pairs.total(pick))
        for s in range(self._loss.shape[1] if self._pairs else 0):
            self._offer(np.full(len(self._loss), s))

    def _any(self) -> Status:
        """Any feasible pick, by an integer program without an objective; else why there is none."""
        until = max(self._deadline, time.perf_counter() + _PATIENCE)
        while True:
            # An infinite unit leaves nothing of the objective.
            status, pick, _ = self._run(self._allowed, np.inf, max(0.1, until - time.perf_counter()))
            self._offer(pick)
            if pick is None or self.pick is not None:
                return status
            self._cuts.append(pick)
            if len(self._cuts) > _MAX_CUTS or time.perf_counter() > until:
                return Status.FEASIBLE

    def _prove(self) -> Status:
        """Integer programs over all that is left, until the unit of the objective fits what is found."""
        floor = float(self._problem.loss.min(1).sum())
        while True:
            if self._objective - self._relaxed.bound <= 2 * self._relaxed.rounding:
                return Status.OPTIMAL
            if self._remaining() <= 0:
                return Status.FEASIBLE
            unit = self._gap()
            status, pick, excess = self._run(self._left(), unit, max(0.1, self._remaining()))
            if pick is None:
                return Status.FEASIBLE  # by HiGHS's tolerances, not even what is known is feasible
            if not self._problem.feasible(pick):
                self._cuts.append(pick)
                if len(self._cuts) > _MAX_CUTS:
                    return Status.FEASIBLE
                continue
            self._offer(pick)
            if status is not Status.OPTIMAL:
                self.bound = max(self.bound, self._relaxed.bound - self._relaxed.rounding + excess)
                return status
            if unit <= _FIT_UNIT * (self._objective - floor) or self._objective == floor:
                return status

    def _run(
        self, keep: NDArray[np.bool_], unit: float, seconds: float, nodes: int | None = None
    ) -> tuple[Status, Ints | None, float]:
        relaxed = self._relaxed
        core = Core(relaxed.reduced, keep, self._base, self._cost, self._limit, relaxed.prices, unit, self._pairs)
        return core.solve(self.pick, self._cuts, seconds, self._seed, nodes)

    def _offer(self, pick: Ints | None) -> None:
        """Take a pick if it is feasible and better."""
        if pick is not None and self._problem.feasible(pick) and self._problem.objective(pick) < self._objective:
            self.pick, self._objective = pick, self._problem.objective(pick)

    def _remaining(self) -> float:
        return self._deadline - time.perf_counter()

    def _gap(self) -> float:
        """How far the best pick is above the relaxation's bound; positive."""
        return max(self._objective - self._relaxed.bound + 2 * self._relaxed.rounding, 1e-300)

    def _left(self) -> NDArray[np.bool_]:
        """Choices that a better pick may make, and those of the best pick and the base ``[G, S]``."""
        keep = self._relaxed.reduced <= self._gap()
        keep[self._groups, self._base] = keep[self._groups, self.pick] = True
        return keep

    def _most_in_doubt(self, keep: NDArray[np.bool_], count: int) -> NDArray[np.bool_]:
        """Of the choices left, those of the groups whose second best adds least, and of the best pick."""
        second = np.where(keep, self._relaxed.reduced, np.inf)
        second[self._groups, self._base] = np.inf
        chosen = np.zeros(len(keep), bool)
        chosen[np.argsort(second.min(1), kind="stable")[:count]] = True
        chosen |= self.pick != self._base
        found = keep & chosen[:, None]
        found[self._groups, self._base] = True
        return found
