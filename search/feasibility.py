"""What limits can be met: alone, under the others, and after the smallest relaxation of all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp

from mpq.errors import MpqError
from mpq.problem import Constraint, Floats, Ints, Problem, Solution, Status
from mpq.search.interaction import solver_for

_DOUBTFUL = 1e-8
_FEASIBILITY = 1e-9  # HiGHS's tolerance, absolute, on rows scaled to about one


@dataclass(frozen=True, eq=False)
class Relaxation:
    """How far limits must be loosened together.

    Attributes:
        share: Each limit must rise by this many of its units; 0 if they can be met as they are.
        pick: Meets all limits then ``[G]``.
        proven: No smaller share would do, within 1e-9.
    """

    share: float
    pick: Ints
    proven: bool


def intervals(problem: Problem) -> dict[str, tuple[Floats, Floats]]:
    """Constraint name -> least and most of its rows ``[R]`` over all picks, each row on its own."""
    most = {c.name: np.where(problem.allowed[..., None], c.cost, -np.inf).max(1).sum(0) for c in problem.constraints}
    return {name: (least, most[name]) for name, least in problem.smallest_usage().items()}


def least_usage(problem: Problem, name: str, time_limit: float = 60.0) -> Solution:
    """The least of a metric under the other constraints, whatever the loss.

    Args:
        problem: With a constraint of this name and one row; its own limit does not count.
        name: Of the constraint.
        time_limit: Seconds.

    Raises:
        MpqError: If there is no such constraint with one row.
    """
    least = Problem(problem.loss, problem.constraints).least(name, np.inf)
    return solver_for(least, time_limit).solve(least)


def smallest_relaxation(
    problem: Problem, units: Mapping[str, float] | None = None, time_limit: float = 60.0
) -> Relaxation:
    """The smallest ``t`` for which the limits ``limit + t * unit`` can be met together.

    One row: from what each group takes at least, or `least_usage` with pair costs. Several: an integer program with
    ``t`` as its one continuous variable, by PuLP with HiGHS; pair costs are added to its answer, not minimized with it.

    Args:
        problem: Limits that are infinite are left out.
        units: Constraint name -> unit of its relaxation, positive; by default the limit itself.
        time_limit: Seconds; after that the best found is returned unproven.

    Raises:
        MpqError: If a unit is missing or not positive.
    """
    limited = [(c, r) for c in problem.constraints for r in range(len(c.limit)) if np.isfinite(c.limit[r])]
    rows = [_row(c, r, units) for c, r in limited]
    if not rows:
        return Relaxation(0.0, problem.allowed.argmax(1), True)
    over = np.stack([cost for cost, _ in rows], 2)  # costs and limits in units of the relaxation
    limit = np.array([limit for _, limit in rows])
    alone = limited[0][0] if len(rows) == 1 else None
    if alone is not None and alone.pairs is not None:
        least = least_usage(Problem(problem.loss, (alone,)), alone.name, time_limit)
        pick = problem.allowed.argmax(1) if least.pick is None else least.pick
        proven = least.status is Status.OPTIMAL
    elif alone is not None:
        pick, proven = np.where(problem.allowed, over[..., 0], np.inf).argmin(1), True
    else:
        pick, proven = _least_excess(problem, over, limit, time_limit)
        proven = proven and all(c.pairs is None for c, _ in limited)  # they are added up, not minimized
    pairs = [c.pairs.total(pick) / _unit(c, 0, units) if c.pairs else 0.0 for c, _ in limited]
    excess = max(0.0, float((over[np.arange(len(pick)), pick].sum(0) + pairs - limit).max()))
    if problem.feasible(pick):
        return Relaxation(0.0, pick, True)
    # Within HiGHS's tolerance another pick may need none, and with pair costs at any excess.
    if excess < _DOUBTFUL or (any(pairs) and not proven):
        free = Problem(np.where(problem.allowed, 0.0, np.inf), problem.constraints)
        found = solver_for(free, time_limit).solve(free).pick
        if found is not None:
            return Relaxation(0.0, found, True)
    return Relaxation(excess, pick, proven)


def _unit(constraint: Constraint, r: int, units: Mapping[str, float] | None) -> float:
    if units is not None and constraint.name not in units:
        raise MpqError(f"there is no unit of a relaxation for {constraint.name!r}; there are: {', '.join(units)}")
    unit = abs(float(constraint.limit[r])) if units is None else units[constraint.name]
    if not unit > 0:
        raise MpqError(f"{constraint.name!r}: the unit of a relaxation must be positive, not {unit:g}")
    return unit


def _row(constraint: Constraint, r: int, units: Mapping[str, float] | None) -> tuple[Floats, float]:
    unit = _unit(constraint, r, units)
    return constraint.cost[..., r] / unit, float(constraint.limit[r]) / unit


def _least_excess(problem: Problem, cost: Floats, limit: Floats, time_limit: float) -> tuple[Ints, bool]:
    """The pick whose largest excess over the limits is least, and whether that is proven."""
    started = time.perf_counter()
    model: Any = pulp.LpProblem("relaxation", pulp.LpMinimize)
    share = model.add_variable("share", lowBound=0)
    g, s = np.nonzero(problem.allowed)
    x = [model.add_variable(f"x_{a}_{b}", cat="Binary") for a, b in zip(g, s, strict=True)]
    model += pulp.LpAffineExpression([(share, 1.0)])
    for r in range(len(limit)):
        # Only what exceeds each group's least counts: sums stay of the size of what is decided.
        least = np.where(problem.allowed, cost[..., r], np.inf).min(1)
        terms = [(v, c) for v, c in zip(x, (cost[g, s, r] - least[g]).tolist(), strict=True) if c]
        model += pulp.LpAffineExpression([*terms, (share, -1.0)]) <= float(limit[r] - least.sum())
    ends = np.append(np.flatnonzero(np.diff(g)) + 1, len(g))
    for a, b in zip([0, *ends[:-1]], ends, strict=True):
        model += pulp.LpAffineExpression([(v, 1.0) for v in x[a:b]]) == 1
    options = dict.fromkeys(
        ("mip_feasibility_tolerance", "primal_feasibility_tolerance", "dual_feasibility_tolerance"), _FEASIBILITY
    )
    seconds = max(0.1, time_limit - (time.perf_counter() - started))
    model.solve(pulp.HiGHS(msg=False, timeLimit=seconds, gapRel=0.0, gapAbs=0.0, threads=1, **options))
    chosen = np.full(problem.loss.shape, -1.0)
    chosen[g, s] = [v.value() or 0.0 for v in x]
    if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        chosen = -np.where(problem.allowed, cost.sum(2), np.inf)  # out of time: what takes least
    return chosen.argmax(1), model.sol_status == pulp.LpSolutionOptimal
