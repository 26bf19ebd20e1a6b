"""Sweep: a measured frontier, by one search after another under rising limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Constraint, Problem
from mpq.search.evaluations import Evaluations, Stop
from mpq.search.feasibility import least_usage
from mpq.search.feasible import roomiest
from mpq.search.measured import MeasuredSearch
from mpq.search.refine import Refine


@dataclass(frozen=True)
class Sweep(MeasuredSearch):
    """Searches under limits of the first constraint, spread evenly from the least that can be met to the given one.

    The least is that under the other constraints; limits that no pick is found for are left out.

    They share their evaluations, so each begins with what those before have learnt, and divide the limit of evaluations
    evenly. `mpq.search.Trace.frontier` gives the frontier that was measured.

    Attributes:
        seed: Random seed.
        inner: The search under each limit; by default `Refine` with this seed.
        points: How many limits; fewer if fewer evaluations are left.
    """

    seed: int = 0
    inner: MeasuredSearch | None = None
    points: int = 32
    name: ClassVar[str] = "sweep"

    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Search under each limit; see `MeasuredSearch.explore`.

        Raises:
            MpqError: If the first constraint is missing or has several rows.
        """
        if not problem.constraints or problem.constraints[0].cost.shape[2] > 1:
            raise MpqError("a sweep needs a problem whose first constraint has one row")
        inner = Refine(self.seed) if self.inner is None else self.inner
        first, *others = problem.constraints
        least, most = _least(problem, first), min(problem.largest_usage()[first.name][0], first.limit[0])
        total, points = evaluations.limit, int(max(1, min(self.points, evaluations.left)))
        try:
            for i, limit in enumerate(np.linspace(least, most, points)):
                if total < math.inf:
                    share = math.ceil(evaluations.left / (points - i))
                    evaluations.limit += share - evaluations.left
                narrower = replace(problem, constraints=(replace(first, limit=np.array([limit])), *others))
                try:
                    if roomiest(narrower).pick is not None:
                        inner.explore(narrower, evaluations)
                except Stop as stop:
                    if stop.__cause__ is not None or evaluations.left > 0:
                        raise
                evaluations.limit = total
        finally:
            evaluations.limit = total
        return f"{points} limits of {first.name}"


def _least(problem: Problem, constraint: Constraint) -> float:
    """The least cost under the other constraints; where none is found in time, what each group costs at least."""
    found = least_usage(problem, constraint.name)
    if found.pick is not None:
        return found.objective
    return float(problem.smallest_usage()[constraint.name][0])
