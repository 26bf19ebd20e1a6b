"""Bisection: the cheapest pick whose measured loss stays within a limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Solution, Status, infeasible
from mpq.search.ilp import Ilp
from mpq.search.interaction import Interaction
from mpq.search.measured import Evaluations, MeasuredSolution, Stop

_INNER = 0.1  # a guess stays away from the ends of its interval by this share of it
_DISTANCES = (0.01, 0.03, 0.1, 0.3)  # of the checks below the answer, in shares of the range of costs


@dataclass(frozen=True)
class Bisection:
    """Least cost under a limit of what is measured, such as a drop of accuracy.

    Schaefer et al. (2023, arXiv:2306.04879) bisect over a list of layers in the order of their sensitivity
    (`mpq.sensitivity.augmented_order`). Here the candidates are the picks of the least predicted loss, interactions
    included, under each limit of the cost, so that any number of schemes and any costs have their place. The interval
    between a cost that fails and one that passes is narrowed, by interpolation where that helps. Nothing makes the
    measured loss monotone along the path, so some cheaper picks are measured, too; if one passes, the search goes on
    below it.

    Attributes:
        limit: Largest measured loss that passes.
        tolerance: Narrow the interval to this share of the range of costs.
        solve: Solver of each step; by default the exact one, or the one for interactions.
    """

    limit: float
    tolerance: float = 1 / 4096
    solve: Callable[[Problem], Solution] | None = None

    def search(self, problem: Problem, evaluations: Evaluations) -> MeasuredSolution:
        """Minimise the first constraint's cost; its limit and the other constraints hold as well.

        Args:
            problem: The first constraint has one row.
            evaluations: Measures what is limited.

        Returns:
            The cheapest pick that was measured to pass. Without one the status is `INFEASIBLE` if no pick meets the
            constraints, else `NO_SOLUTION`. The message says whether what was measured is monotone in the cost.

        Raises:
            MpqError: If the first constraint is missing or has several rows.
            Exception: What the measurement raises, if it fails before any is finished.
        """
        if not problem.constraints or problem.constraints[0].cost.shape[2] > 1:
            raise MpqError("bisection needs a problem whose first constraint has one row: the cost to minimise")
        started = time.perf_counter()
        path = _Path(self, problem, evaluations)
        if path.at(path.most) is None:
            why = infeasible(problem, 0.0, "bisection").message
            return path.solution(Status.INFEASIBLE, started, why)
        try:
            message = path.descend()
        except Stop as stop:
            if stop.__cause__ is not None and not len(evaluations.trace):
                raise stop.__cause__ from None
            message = str(stop)
        return path.solution(Status.NO_SOLUTION, started, message)


class _Path:
    """The picks of least predicted loss under each limit of the cost, and what of them was measured."""

    def __init__(self, settings: Bisection, problem: Problem, evaluations: Evaluations) -> None:
        self._settings, self._problem, self._evaluations = settings, problem, evaluations
        first = problem.constraints[0]
        self._cost = first.cost[..., 0]
        self._solve = settings.solve or (Interaction() if problem.interactions is not None else Ilp()).solve
        self.least = float(problem.smallest_usage()[first.name][0])
        self.most = min(float(first.limit[0]), float(np.where(problem.allowed, self._cost, -np.inf).max(1).sum()))
        self._solved: dict[float, Ints | None] = {}
        self._failing: list[float] = []  # limits of the cost whose picks fail

    def at(self, limit: float) -> Ints | None:
        """The pick under a limit of the cost, or None if the constraints allow none."""
        if limit not in self._solved:
            first, *others = self._problem.constraints
            narrower = replace(self._problem, constraints=(replace(first, limit=np.array([limit])), *others))
            self._solved[limit] = self._solve(narrower).pick
        return self._solved[limit]

    def descend(self) -> str:
        """Narrow down, check below, and again as long as a check passes."""
        high = self._passes(self.most)
        if high is None:
            return f"the pick of the least predicted loss does not pass: {self._measured(self.most):.6g} measured"
        while high is not None:
            best, high = self._narrow(high), None
            for share in _DISTANCES:
                lower = best - share * (self.most - self.least)
                if high is None and lower > self.least:
                    high = self._passes(lower)
        return self._monotone()

    def _narrow(self, high: float) -> float:
        """Cost of the cheapest pick that passes, of those between the next lower limit that fails and ``high``."""
        low = max((x for x in self._failing if x < high), default=self.least)
        halve = False
        while high - low > self._settings.tolerance * (self.most - self.least):
            width, guess = high - low, (low + high) / 2 if halve else self._interpolated(low, high)
            cheaper = self._passes(guess)
            low, high = (guess, high) if cheaper is None else (low, cheaper)
            halve = not halve and high - low > width / 2
        return high

    def _passes(self, limit: float) -> float | None:
        """Cost of the pick under a limit if it passes, else None."""
        pick = self.at(limit)
        if pick is None or self._measured(limit) > self._settings.limit:
            self._failing.append(limit)
            return None
        return self._used(pick)

    def _interpolated(self, low: float, high: float) -> float:
        """Where the measured loss should reach the limit, if its logarithm is linear in the cost."""
        ends = [p for p in (self.at(low), self.at(high)) if p is not None and self._evaluations.known(p)]
        middle = (low + high) / 2
        if len(ends) < 2:
            return middle
        # A quarter of the limit keeps logarithms of losses near zero, or below it, in bounds.
        floor = 0.25 * abs(self._settings.limit) + 1e-12
        over = [
            math.log(max(self._loss(p) + floor, floor) / (self._settings.limit + floor)) for p in ends if p is not None
        ]
        if not over[0] > over[1]:
            return middle
        share = min(max(over[0] / (over[0] - over[1]), _INNER), 1 - _INNER)
        return low + share * (high - low)

    def _measured(self, limit: float) -> float:
        pick = self.at(limit)
        assert pick is not None
        return self._loss(pick)

    def _loss(self, pick: Ints) -> float:
        return float(self._evaluations.measure(pick)[0])

    def _used(self, pick: Ints) -> float:
        return float(self._cost[np.arange(len(pick)), pick].sum())

    def _monotone(self) -> str:
        """Whether all that is cheaper was measured to lose more."""
        trace = self._evaluations.trace
        order = np.argsort([self._used(p) for p in trace.picks], kind="stable")
        rises = int((np.diff(trace.losses[order]) > 0).sum())
        if not rises:
            return "the measured loss falls as the cost rises, wherever measured"
        return f"the measured loss is not monotone: it rises with the cost at {rises} of {len(order) - 1} steps"

    def solution(self, otherwise: Status, started: float, message: str) -> MeasuredSolution:
        """The cheapest pick that passes; without one, the status given."""
        trace, problem = self._evaluations.trace, self._problem
        seconds = time.perf_counter() - started
        passing = [
            i for i, p in enumerate(trace.picks) if trace.losses[i] <= self._settings.limit and problem.feasible(p)
        ]
        if not passing:
            return MeasuredSolution(otherwise, None, np.inf, np.inf, {}, trace, seconds, "bisection", message)
        used: Floats = np.array([self._used(trace.picks[i]) for i in passing])
        best = int(passing[used.argmin()])
        pick, loss = trace.picks[best], float(trace.losses[best])
        predicted, usage = problem.objective(pick), problem.usage(pick)
        return MeasuredSolution(Status.FEASIBLE, pick, loss, predicted, usage, trace, seconds, "bisection", message)
