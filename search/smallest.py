"""The other direction: the least size, latency or other cost with the loss under a limit."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from mpq.problem import FLOAT_TOLERANCE, Constraint, Problem, Solution, Status
from mpq.search.interaction import Interaction, solver_for

_STEPS = 60
_SHARE = 1 / 12  # of the time limit, for one solve of the bisection
_PRECISION = 1e-7  # of the cost: where it is no whole number, bisection ends there


def smallest_cost(problem: Problem, name: str, loss_limit: float, time_limit: float = 60.0) -> Solution:
    """The least of one constraint's metric with the total loss under a limit, the other constraints holding.

    Without interactions this is one more problem with a linear limit (`Problem.least`; AdaQuant, Hubara et al., 2021),
    solved with proof. With interactions: bisection over limits of the cost, each solved by `Interaction`. A cost is
    ruled out only where that solver's bound exceeds the loss limit, so that the bound returned is proven; where it can
    tell neither, bisection goes on above, and the answer is `FEASIBLE` with a gap.

    Args:
        problem: With a constraint of this name and one row; its own limit does not count.
        name: The constraint whose metric is to be least.
        loss_limit: Of the total loss, interactions included.
        time_limit: Seconds.

    Returns:
        A `Solution` whose objective and bound are of the metric, not of the loss.

    Raises:
        MpqError: If there is no such constraint with one row.
    """
    started = time.perf_counter()
    least = Problem(problem.loss, problem.constraints).least(name, loss_limit)
    if problem.interactions is None or not problem.interactions.any():
        return solver_for(least, time_limit).solve(least)
    run = _Bisection(problem, next(c for c in problem.constraints if c.name == name), loss_limit, started + time_limit)
    return run.solve(started, _SHARE * time_limit)


class _Bisection:
    """Limits of the cost between one that is ruled out and that of the best pick."""

    def __init__(self, problem: Problem, constraint: Constraint, loss_limit: float, deadline: float) -> None:
        self._problem, self._constraint, self._deadline = problem, constraint, deadline
        self._others = tuple(c for c in problem.constraints if c is not constraint)
        self._loss_limit = loss_limit + FLOAT_TOLERANCE * abs(loss_limit)
        self._cost = constraint.cost[..., 0]
        self._whole = constraint.pairs is None and bool((self._cost == np.round(self._cost)).all())

    def solve(self, started: float, seconds: float) -> Solution:
        """Bisection; see `smallest_cost`."""
        first = self._least_loss(np.inf, seconds)
        if first.pick is None or first.objective > self._loss_limit:
            return self._none(first, time.perf_counter() - started)
        pick = first.pick
        high = float(self._constraint.usage(pick)[0])
        floor = float(np.where(self._problem.allowed, self._cost, np.inf).min(1).sum())
        ruled_out = low = floor - (1.0 if self._whole else _PRECISION * abs(floor))
        for _ in range(_STEPS):
            step = 1.0 if self._whole else _PRECISION * max(abs(high), abs(high - floor))
            if high - low <= step or time.perf_counter() > self._deadline:
                break
            limit = (low + high) / 2
            limit = float(np.clip(np.floor(limit), low, high - 1)) if self._whole else limit
            found = self._least_loss(limit, seconds)
            if found.pick is not None and found.objective <= self._loss_limit:
                pick, high = found.pick, float(self._constraint.usage(found.pick)[0])
                continue
            if found.bound > self._loss_limit:
                ruled_out = max(ruled_out, limit)
            low = limit
        bound = min(high, ruled_out + 1 if self._whole else ruled_out)
        status = Status.OPTIMAL if bound >= high else Status.FEASIBLE
        usage = {**self._problem.usage(pick), "loss": np.array([self._problem.objective(pick)])}
        return Solution(status, pick, high, bound, usage, time.perf_counter() - started, "bisection")

    def _least_loss(self, limit: float, seconds: float) -> Solution:
        c = self._constraint
        limited = () if np.isinf(limit) else (replace(c, limit=np.array([limit])),)
        problem = Problem(self._problem.loss, (*self._others, *limited), self._problem.interactions)
        return Interaction(seconds).solve(problem)

    def _none(self, first: Solution, seconds: float) -> Solution:
        """No pick with so little loss: proven, or not found in time."""
        if first.pick is None:
            return first
        proven = first.bound > self._loss_limit
        status = Status.INFEASIBLE if proven else Status.NO_SOLUTION
        message = f"the least total loss found is {first.objective:.6g}, proven to be at least {first.bound:.6g}"
        bound = np.inf if proven else -np.inf
        return Solution(status, None, np.inf, bound, {}, seconds, "bisection", {}, message)
