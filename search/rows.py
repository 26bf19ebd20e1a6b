"""Rows of all constraints side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpq.problem import Constraint, Floats, PairCosts, Problem


def binding_rows(problem: Problem) -> tuple[Floats, Floats]:
    """Costs ``[G, S, R]`` and limits ``[R]`` (with their slack) of all rows that some pick violates."""
    G, S = problem.loss.shape
    kept = [(c, _binding(problem, c)) for c in problem.constraints]
    cost = np.concatenate([np.zeros((G, S, 0)), *(c.cost[..., rows] for c, rows in kept)], axis=2)
    return cost, np.concatenate([np.zeros(0), *(c.slack_limit[rows] for c, rows in kept)])


def binding_pairs(problem: Problem) -> tuple[tuple[int, PairCosts], ...]:
    """The pair costs of `binding_rows`, each with the number of its row."""
    kept = [(c, int(_binding(problem, c).sum())) for c in problem.constraints]
    first = np.cumsum([0, *(n for _, n in kept)])
    return tuple((int(i), c.pairs) for i, (c, n) in zip(first, kept, strict=False) if n and c.pairs is not None)


def limit_shares(problem: Problem) -> Floats:
    """Costs as shares of all limits that are finite, those that no pick reaches too, summed ``[G, S]``."""
    G, S = problem.loss.shape
    kept = [(c, np.isfinite(c.limit)) for c in problem.constraints]
    cost = np.concatenate([np.zeros((G, S, 0)), *(c.cost[..., rows] for c, rows in kept)], axis=2)
    limit = np.concatenate([np.zeros(0), *(c.limit[rows] for c, rows in kept)])
    shares: Floats = cost / row_units(cost, limit)
    total: Floats = shares.sum(2)
    return total


def row_units(cost: Floats, limit: Floats) -> Floats:
    """What rows ``[R]`` are compared in: their limits, but for those that are next to nothing beside the costs."""
    largest = np.abs(cost).max(1, initial=0.0).sum(0)
    units: Floats = np.maximum(np.maximum(np.abs(limit), 1e-12 * largest), 1e-300)
    return units


def fitting(keep: NDArray[np.bool_], cost: Floats, limit: Floats) -> NDArray[np.bool_]:
    """Choices ``[G, S]`` without those that exceed a limit even if all other groups take what costs least."""
    while keep.any(1).all():
        masked = np.where(keep[..., None], cost, np.inf)
        least = masked.min(1)
        rounding = 1e-9 * np.abs(limit) + 1e-12 * np.abs(least).sum(0)
        over = (masked - least[:, None] > limit - least.sum(0) + rounding).any(2)
        if not (keep & over).any():
            break
        keep = keep & ~over
    return keep


def named_prices(problem: Problem, prices: Floats) -> dict[str, float]:
    """Constraint name -> loss saved per unit that all its rows are loosened; prices are of the binding rows."""
    found, first = {}, 0
    for c in problem.constraints:
        count = int(_binding(problem, c).sum())
        found[c.name] = float(prices[first : first + count].sum())
        first += count
    return found


def _binding(problem: Problem, constraint: Constraint) -> NDArray[np.bool_]:
    """Which rows some pick violates ``[R]``."""
    found: NDArray[np.bool_] = problem.largest_usage()[constraint.name] > constraint.slack_limit
    return found
