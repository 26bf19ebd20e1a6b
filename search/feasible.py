"""Random feasible picks, and repair of infeasible ones: what sampling searches share."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Solution, solved
from mpq.search.ilp import Ilp
from mpq.search.rows import binding_rows, row_units


def roomiest(problem: Problem) -> Solution:
    """A feasible pick that leaves much room in all constraints, found without the losses.

    Objective and bound are of the shares of the limits that are used. Without a pick, status and message say whether
    there is none or none was found in time.
    """
    cost, limit = binding_rows(problem)
    used = (cost / row_units(cost, limit)).sum(2)
    shares = Problem(np.where(problem.allowed, used, np.inf), problem.constraints)
    pick: Ints = shares.loss.argmin(1)
    return solved(shares, pick, -np.inf, 0.0, "roomiest") if problem.feasible(pick) else Ilp().solve(shares)


class FeasiblePicks:
    """Draws feasible picks of a problem and makes others feasible.

    Args:
        problem: Its constraints and allowed schemes count, its losses don't.

    Attributes:
        anchor: A feasible pick ``[G]`` (`roomiest`), where repair ends if nothing else helps.

    Raises:
        MpqError: If no feasible pick is found.
    """

    def __init__(self, problem: Problem) -> None:
        first = roomiest(problem)
        if first.pick is None:
            raise MpqError(first.message)
        self.problem, self.anchor = problem, first.pick
        self._cost, self._limit = binding_rows(problem)
        self._units = row_units(self._cost, self._limit)
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
        found[blocked] = self.anchor[blocked]
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
            pick[g] = self.anchor[g]
        return pick

    def _excess(self, used: Floats) -> Floats:
        """How far rows ``[..., R]`` are above their limits, in shares of the limits and summed."""
        over: Floats = np.maximum(used - self._limit, 0.0) / self._units
        total: Floats = over.sum(-1)
        return total
