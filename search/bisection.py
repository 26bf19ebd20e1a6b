"""Bisection: the cheapest pick whose measured loss stays within a limit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Solution, Status
from mpq.search.evaluations import Evaluations, Stop
from mpq.search.ilp import Ilp
from mpq.search.interaction import Interaction
from mpq.search.measured import MeasuredSolution

_INNER = 0.1  # a guess stays away from the ends of its interval by this share of it
_DISTANCES = (0.01, 0.03, 0.1, 0.3)  # of the checks below the answer, in shares of the range of costs


@dataclass(frozen=True)
class Bisection:
    """Least cost under a limit of what is measured, such as a drop of accuracy.

    Schaefer et al. (2023, arXiv:2306.04879) bisect over a list of layers in the order of their sensitivity
    (`mpq.sensitivity.augmented_order`). Here the candidates are the picks of the least predicted loss, interactions
    included, under each limit of the cost, so that any number of schemes and any costs have their place. The interval
    between a cost that fails and one that passes is narrowed, by interpolation where that helps. Nothing makes the
    measured loss monotone along the path, so some cheaper picks are measured, too, also where the dearest fails; if one
    passes, the search goes on below it.

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
            The cheapest pick that was measured to pass. Without one the status is `INFEASIBLE` if it is proven that no
            pick meets the constraints, else `NO_SOLUTION`. The message says whether what was measured is monotone in
            the cost.

        Raises:
            MpqError: If the first constraint is missing or has several rows.
            Exception: What the measurement raises, if it fails before any is finished.
        """
        if not problem.constraints or problem.constraints[0].cost.shape[2] > 1:
            raise MpqError("bisection needs a problem whose first constraint has one row: the cost to minimise")
        started = time.perf_counter()
        path = _Path(self, problem, evaluations)
        first = path.solved(path.most)
        if first.pick is None:
            return path.solution(first.status, started, first.message)
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
        self._cost = first
        self._solve = settings.solve or (Interaction() if problem.interactions is not None else Ilp()).solve
        self.least = float(problem.smallest_usage()[first.name][0])
        self.most = min(float(first.limit[0]), float(problem.largest_usage()[first.name][0]))
        self._solved: dict[float, Solution] = {}
        self._failing: list[float] = []  # limits of the cost whose picks fail

    def solved(self, limit: float) -> Solution:
        """The pick of least predicted loss under a limit of the cost."""
        if limit not in self._solved:
            first, *others = self._problem.constraints
            narrower = replace(self._problem, constraints=(replace(first, limit=np.array([limit])), *others))
            self._solved[limit] = self._solve(narrower)
        return self._solved[limit]

    def descend(self) -> str:
        """Narrow down, check below, and again as long as a check passes."""
        high = self._passes(self.most)
        if high is None:
            high = self._passes_below(self.most)
        if high is None:
            count, least = len(self._evaluations.trace), self._evaluations.trace.losses.min()
            return f"none of the {count} picks measured passes, that of the least predicted loss included: {least:.6g}"
        while high is not None:
            high = self._passes_below(self._narrow(high))
        return self._monotone()

    def _passes_below(self, cost: float) -> float | None:
        """Cost of the first pick that passes, of some that are cheaper by growing distances; None without one."""
        for share in _DISTANCES:
            lower = cost - share * (self.most - self.least)
            found = self._passes(lower) if lower > self.least else None
            if found is not None:
                return found
        return None

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
        pick = self.solved(limit).pick
        if pick is None or self._loss(pick) > self._settings.limit:
            self._failing.append(limit)
            return None
        return self._used(pick)

    def _interpolated(self, low: float, high: float) -> float:
        """Where the measured loss should reach the limit, if its logarithm is linear in the cost."""
        picks = [p for p in (self.solved(low).pick, self.solved(high).pick) if p is not None]
        ends = [self._loss(p) for p in picks if self._evaluations.known(p)]
        # A quarter of the limit keeps logarithms of losses near zero, or below it, in bounds.
        floor = 0.25 * abs(self._settings.limit) + 1e-12
        middle = (low + high) / 2
        if len(ends) < 2 or not np.isfinite(ends).all() or self._settings.limit + floor <= 0:
            return middle
        over = [math.log(max(loss + floor, floor) / (self._settings.limit + floor)) for loss in ends]
        if not over[0] > over[1]:
            return middle
        share = min(max(over[0] / (over[0] - over[1]), _INNER), 1 - _INNER)
        return low + share * (high - low)

    def _loss(self, pick: Ints) -> float:
        return float(self._evaluations.measure([pick])[0])

    def _used(self, pick: Ints) -> float:
        return float(self._cost.usage(pick)[0])

    def _monotone(self) -> str:
        """Whether all that is cheaper was measured to lose more."""
        trace = self._evaluations.trace
        order = np.argsort([self._used(p) for p in trace.picks], kind="stable")
        rises = int((trace.losses[order][1:] > trace.losses[order][:-1]).sum())
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
