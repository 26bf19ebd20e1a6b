"""Frontiers of loss against two costs, by the epsilon-constraint method; hypervolumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mpq._lazy import require
from mpq.errors import MpqError
from mpq.problem import Constraint, Floats, Ints, Problem, Solution, Status
from mpq.search.pareto import undominated

_WEIGHT = 1e-6  # share of the loss that all costs together may make up


@dataclass(frozen=True, eq=False)
class Surface:
    """Picks that no other of them dominates in loss and costs.

    Attributes:
        picks: ``[P, G]``.
        cost: Of each constraint given ``[P, 2]``; rows sorted.
        loss: ``[P]``.
        proven: No pick at all dominates these ``[P]``; else the solver ran out of time.
    """

    picks: Ints
    cost: Floats
    loss: Floats
    proven: NDArray[np.bool_]


def epsilon_surface(problem: Problem, names: Sequence[str], points: int = 8, time_limit: float = 60.0) -> Surface:
    """Trade-offs between the loss and two costs: the least loss under a grid of limits of both.

    The loss gets a small share of the costs, so that of equal losses the cheapest is found and every proven point is a
    true optimum in the sense of Pareto (Mavrotas, 2009). A grid cell that the answer of looser limits meets as well has
    the same answer, and is not solved.

    Args:
        problem: With constraints of these names, of one row each; their own limits bound the grid from above. Other
            constraints hold everywhere.
        names: Names of the two constraints.
        points: Limits of each cost, evenly from its least to its most.
        time_limit: Seconds of each cell.

    Raises:
        MpqError: If the constraints aren't there or have several rows.
    """
    from mpq.search.interaction import solver_for

    chosen = [c for name in names for c in problem.constraints if c.name == name and c.cost.shape[2] == 1]
    if len(chosen) != 2:
        raise MpqError(f"{list(names)} must name two constraints of one row each")
    others = tuple(c for c in problem.constraints if c.name not in names)
    limits = [_limits(problem, c, points) for c in chosen]
    augmented = replace(problem, loss=_augmented(problem, chosen))
    solver = solver_for(problem, time_limit)
    answers: dict[tuple[int, int], Solution | None] = {}
    for i in reversed(range(len(limits[0]))):
        for j in reversed(range(len(limits[1]))):
            cell = limits[0][i], limits[1][j]
            looser = (answers.get((i + 1, j)), answers.get((i, j + 1)))
            if any(s is not None and s.pick is None for s in looser):
                answers[i, j] = next(s for s in looser if s is not None and s.pick is None)
                continue
            answers[i, j] = next((s for s in looser if s is not None and _meets(s, chosen, cell)), None)
            if answers[i, j] is None:
                tight = tuple(replace(c, limit=np.array([x])) for c, x in zip(chosen, cell, strict=True))
                answers[i, j] = solver.solve(replace(augmented, constraints=(*others, *tight)))
    return _surface(problem, chosen, [s for s in answers.values() if s is not None and s.pick is not None])


def _limits(problem: Problem, constraint: Constraint, points: int) -> Floats:
    """Limits from the least to the most that any pick uses, the constraint's own at most ``[points]``."""
    cost = np.where(problem.allowed, constraint.cost[..., 0], np.nan)
    low, high = float(np.nanmin(cost, 1).sum()), float(np.nanmax(cost, 1).sum())
    return np.linspace(low, max(low, min(high, float(constraint.limit[0]))), points)


def _augmented(problem: Problem, chosen: list[Constraint]) -> Floats:
    """The loss with a small share of each cost, in units of its span."""
    loss = problem.loss.copy()
    finite = np.where(problem.allowed, loss, np.nan)
    span = float((np.nanmax(finite, 1) - np.nanmin(finite, 1)).sum()) or 1.0
    for c in chosen:
        cost = c.cost[..., 0] - c.cost[..., 0].min(1, keepdims=True)
        loss += _WEIGHT * span / len(chosen) * cost / (float(cost.max(1).sum()) or 1.0)
    return loss


def _meets(solution: Solution, chosen: list[Constraint], cell: tuple[float, float]) -> bool:
    if solution.status is not Status.OPTIMAL:
        return False
    used = [float(solution.usage[c.name][0]) for c in chosen]
    return all(u <= limit for u, limit in zip(used, cell, strict=True))


def _surface(problem: Problem, chosen: list[Constraint], solutions: list[Solution]) -> Surface:
    G = len(problem.loss)
    picks = np.array([s.pick for s in solutions], np.int64).reshape(len(solutions), G)
    loss = np.array([problem.objective(p) for p in picks])
    cost = np.stack([c.cost[np.arange(G), picks, 0].sum(1) for c in chosen], 1)
    kept = undominated(np.c_[cost, loss])
    proven = np.array([s.status is Status.OPTIMAL for s in solutions], bool)
    return Surface(picks[kept], cost[kept], loss[kept], proven[kept])


def hypervolume(points: Floats, reference: Floats) -> float:
    """Volume that points ``[N, D]`` dominate up to a reference ``[D]``, smaller being better (Zitzler, 1999).

    Two objectives are swept; more go to pymoo.
    """
    points, reference = np.asarray(points, np.float64), np.asarray(reference, np.float64)
    inside = points[(points < reference).all(1)]
    if not len(inside):
        return 0.0
    if points.shape[1] != 2:
        require(("pymoo",), "search")
        from pymoo.indicators.hv import HV

        return float(HV(ref_point=reference)(inside))
    front = inside[undominated(inside)]
    right = np.append(front[1:, 0], reference[0])
    return float(((right - front[:, 0]) * (reference[1] - front[:, 1])).sum())
