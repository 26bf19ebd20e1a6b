"""Random feasible picks, and repair of infeasible ones: what sampling searches share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.problem import Floats, Ints, Problem
from mpq.search.ilp import Ilp
from mpq.search.rows import binding_rows


def roomiest(problem: Problem) -> Ints | None:
    """A feasible pick ``[G]`` that leaves much room in all constraints, found without the losses; None if none is."""
    cost, limit = binding_rows(problem)
    shares = np.where(problem.allowed, (cost / _scale(limit)).sum(2), np.inf)
    pick: Ints = shares.argmin(1)
    if problem.feasible(pick):
        return pick
    return Ilp().solve(Problem(shares, problem.constraints)).pick


class FeasiblePicks:
    """Draws feasible picks of a problem and makes others feasible.

    Args:
        problem: Its constraints and allowed schemes count, its losses don't.
        anchor: A feasible pick, where repair ends if nothing else helps.
    """

    def __init__(self, problem: Problem, anchor: Ints) -> None:
        self.problem, self._anchor = problem, anchor
        self._cost, self._limit = binding_rows(problem)
        self._groups = np.arange(len(problem.loss))
        self._options = [np.flatnonzero(row) for row in problem.allowed]

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """Picks ``[count, G]``: schemes at random, evenly, then repaired; some may be equal."""
        return np.array([self.repair([rng.choice(o) for o in self._options], rng) for _ in range(count)], np.int64)

    def fits(self, picks: Ints) -> NDArray[np.bool_]:
        """Which of picks ``[K, G]`` are feasible, ``[K]``."""
        used = self._cost[self._groups, picks].sum(1)
        fits: NDArray[np.bool_] = (used <= self._limit).all(1) & self.problem.allowed[self._groups, picks].all(1)
        if any(c.pairs is not None for c in self.problem.constraints):
            fits &= [self.problem.feasible(p) for p in picks]
        return fits

    def repair(self, pick: ArrayLike, rng: np.random.Generator) -> Ints:
        """A pick ``[G]`` made feasible by random changes of one group, each of which lowers the excess.

        Schemes that are not allowed are replaced by those of the anchor.
        """
        found = np.array(pick, np.int64)
        blocked = ~self.problem.allowed[self._groups, found]
        found[blocked] = self._anchor[blocked]
        while not self.problem.feasible(found):
            used = self._cost[self._groups, found]
            excess = self._excess(used.sum(0) - used[:, None] + self._cost)
            better = np.argwhere(self.problem.allowed & (excess < self._excess(used.sum(0)) * (1 - 1e-12)))
            if not len(better):
                return self._towards_anchor(found, rng)
            g, s = better[rng.integers(len(better))]
            found[g] = s
        return found

    def _towards_anchor(self, pick: Ints, rng: np.random.Generator) -> Ints:
        for g in rng.permutation(len(pick)):
            if self.problem.feasible(pick):
                break
            pick[g] = self._anchor[g]
        return pick

    def _excess(self, used: Floats) -> Floats:
        """How far rows ``[..., R]`` are above their limits, in shares of the limits and summed."""
        over: Floats = np.maximum(used - self._limit, 0.0) / _scale(self._limit)
        total: Floats = over.sum(-1)
        return total


def _scale(limit: Floats) -> Floats:
    return np.maximum(np.abs(limit), 1e-300)
