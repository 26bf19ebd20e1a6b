"""Frontier of a loss with interactions against one cost, by local search at many limits."""

from __future__ import annotations

import numpy as np

from mpq.problem import Constraint, Floats, Ints, Problem
from mpq.search.exhaustive import totals
from mpq.search.hull import linear_optimum
from mpq.search.interaction import symmetric
from mpq.search.local_search import LocalSearch, with_others
from mpq.search.pareto import FrontierPicks, undominated

_MOST, _FEWEST = 80, 8  # limits
_KICKS = 4


def interaction_frontier(
    problem: Problem, cost: Floats, starts: FrontierPicks, work: float = 1e8, seed: int = 0
) -> FrontierPicks:
    """Best picks found at limits along a frontier without interactions; none of them dominates another.

    Limits spread over the frontier so far are passed upwards, downwards and upwards again. At each, local search starts
    from the pick so far, from the neighbouring answer and from the best pick for the loss linearized there (Frank and
    Wolfe, 1956); on the way down also from random kicks. In the end no change of a single group betters any point
    (unless there are more of them than ``work`` allows). Nothing is proven: to prove one limit, solve it with
    `mpq.search.Interaction`.

    Args:
        problem: Loss and interactions, no constraints.
        cost: ``[G, S]``, finite.
        starts: Frontier without interactions.
        work: Pair moves to look at, about 25 million a second; larger problems get fewer limits.
        seed: Of the kicks.
    """
    problem = symmetric(problem)
    G = len(problem.loss)
    if G < 2:
        return starts
    descent = problem.loss.size**2 * 5  # pair moves, roughly
    count = int(np.clip(work / (6 * descent), _FEWEST, _MOST))
    share, rng = work / (3 * count), np.random.default_rng(seed)
    front, visited = starts, starts.picks
    for step in (1, -1, 1):
        chosen = _spread(front.cost, count)
        best, limits = list(front.picks[chosen]), front.cost[chosen]
        for i in range(len(limits))[::step]:
            search = _search(problem, cost, limits[i])
            begin = [best[i]]
            if 0 <= i - step < len(limits):
                begin += [_linearized(problem, best[i - step], cost, limits[i]), best[i - step]]
            begin = sorted((p for p in begin if search.problem.feasible(p)), key=problem.objective)
            best[i] = search.search(begin, _KICKS if step < 0 else 0, share, np.inf, rng)
        visited = np.unique(np.concatenate([visited, best]), axis=0)
        front = _front_of(problem, cost, visited)
    if len(front.picks) * G * problem.loss.size > work:
        return front
    settled = [_search(problem, cost, c).descend(p, pairs=False) for p, c in zip(front.picks, front.cost, strict=True)]
    return _front_of(problem, cost, np.unique(settled, axis=0))


def _front_of(problem: Problem, cost: Floats, picks: Ints) -> FrontierPicks:
    """Those that no other dominates."""
    spent, loss = cost[np.arange(len(cost)), picks].sum(1), totals(problem, picks)
    kept = undominated(np.c_[spent, loss])
    return FrontierPicks(picks[kept], spent[kept], loss[kept], exact=False)


def _spread(cost: Floats, count: int) -> Ints:
    """About this many of some points, half evenly along the cost and half along the list ``[n]``."""
    along_cost = np.searchsorted(cost, np.linspace(cost[0], cost[-1], count // 2))
    along_list = np.linspace(0, len(cost) - 1, count - count // 2).astype(np.int64)
    return np.union1d(np.minimum(along_cost, len(cost) - 1), along_list)


def _search(problem: Problem, cost: Floats, limit: float) -> LocalSearch:
    limited = Problem(problem.loss, (Constraint("cost", "", cost, np.array([limit])),), problem.interactions)
    return LocalSearch(limited, np.inf)


def _linearized(problem: Problem, pick: Ints, cost: Floats, limit: float) -> Ints:
    """The best pick if each group's interactions were those with another pick."""
    return linear_optimum(problem.loss + with_others(problem, pick), cost, limit)[1]
