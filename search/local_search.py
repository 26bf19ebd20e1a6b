"""Local search for quadratic multiple-choice problems: change one group, or two at once, while that helps."""

from __future__ import annotations

import time

import numpy as np

from mpq.problem import Floats, Ints, Problem
from mpq.search.rows import binding_rows

_CHUNK = 2_000_000  # pair moves looked at together
_TOLERANCE = 1e-11  # of the sum of all terms: smaller gains are rounding
_KICK = 7  # groups changed at random between two descents


def with_others(problem: Problem, pick: Ints) -> Floats:
    """Interactions of each choice with what all other groups of a pick ``[G]`` took ``[G, S]``; zero without any."""
    if problem.interactions is None:
        return np.zeros_like(problem.loss)
    found: Floats = problem.interactions[:, :, np.arange(len(pick)), pick].sum(2)
    return found


class LocalSearch:
    """Descent from a pick to one that no feasible change of one or two groups betters, from many starts.

    Args:
        problem: With exactly symmetric interactions, of at least two groups.
        deadline: Value of ``time.perf_counter()`` at which a descent stops.

    Attributes:
        interactions: Those of the problem.
        cost: See `binding_rows`.
        limit: See `binding_rows`.
        work: Pair moves looked at so far.
    """

    def __init__(self, problem: Problem, deadline: float) -> None:
        assert problem.interactions is not None
        self.problem, self.deadline, self.work = problem, deadline, 0
        self.interactions: Floats = problem.interactions
        self.cost, self.limit = binding_rows(problem)
        self._groups = np.arange(len(problem.loss))
        G, S = problem.loss.shape
        rows = max(1, _CHUNK // (S * G * S))
        self._chunks = [(first, min(first + rows, G)) for first in range(0, G, rows)]

    def search(
        self, starts: list[Ints], restarts: int, max_work: float, until: float, rng: np.random.Generator
    ) -> Ints:
        """Descend from feasible picks, then again and again from the best one with some groups changed at random.

        Args:
            starts: Feasible picks, best first.
            restarts: How often to change the best pick and descend again.
            max_work: No descent begins after this many pair moves.
            until: Nor after this value of ``time.perf_counter()``.
            rng: Where the changes come from.
        """
        best, least = starts[0], np.inf
        for i in range(len(starts) + restarts):
            if i and (self.work > max_work or time.perf_counter() > until):
                break
            pick = self.descend(starts[i] if i < len(starts) else self._kicked(best, rng))
            found = self.problem.objective(pick)
            if found <= least:
                best, least = pick, found
        return best

    def descend(self, pick: Ints, *, pairs: bool = True) -> Ints:
        """Best improvement by single and, if wanted, paired changes from a feasible pick."""
        g = self._groups
        self._pick = pick.copy()
        self._taken = self.interactions[g, pick]  # interactions of what each group took with all choices [G, G, S]
        self._total = self.problem.loss + self._taken.sum(0)
        terms = np.abs(self.problem.loss[g, pick]).sum() + 0.5 * np.abs(self._taken[g[:, None], g, pick]).sum()
        self._least = -_TOLERANCE * float(terms)
        self._refresh()
        idle, c = 0, 0
        while idle < len(self._chunks) and time.perf_counter() < self.deadline:
            while self._move_one() or (pairs and self._move_two(*self._chunks[c])):
                idle = 0
                if time.perf_counter() > self.deadline:
                    break
            idle, c = idle + 1, (c + 1) % len(self._chunks)
        return self._pick

    def _kicked(self, pick: Ints, rng: np.random.Generator) -> Ints:
        found = pick.copy()
        room = self.limit - self.cost[self._groups, found].sum(0)
        for g in rng.permutation(len(found))[:_KICK]:
            added = self.cost[g] - self.cost[g, found[g]]
            fits = self.problem.allowed[g] & (added <= room).all(1)
            fits[found[g]] = False
            if fits.any():
                s = rng.choice(np.flatnonzero(fits))
                found[g], room = s, room - added[s]
        return found if self.problem.feasible(found) else pick

    def _refresh(self) -> None:
        """What each change adds to the objective and to the rows, and the room in the rows."""
        g, pick = self._groups, self._pick
        self._change = self._total - self._total[g, pick][:, None]
        self._added = self.cost - self.cost[g, pick][:, None]
        self._room = self.limit - self.cost[g, pick].sum(0)

    def _apply(self, *changes: tuple[int, int]) -> bool:
        """Make the changes (group, scheme) if the pick stays feasible."""
        pick = self._pick.copy()
        for g, s in changes:
            pick[g] = s
        if not self.problem.feasible(pick):
            return False
        self._pick = pick
        for g, s in changes:
            self._total += self.interactions[g, s] - self._taken[g]
            self._taken[g] = self.interactions[g, s]
        self._refresh()
        return True

    def _move_one(self) -> bool:
        change = np.where((self._added <= self._room).all(2), self._change, 0.0)
        better = np.argwhere(change < self._least)
        order = np.argsort(change[tuple(better.T)], kind="stable")
        return any(self._apply((int(g), int(s))) for g, s in better[order])

    def _move_two(self, first: int, last: int) -> bool:
        """The best feasible pair of changes, of a group in ``first:last`` and of a group from ``first`` on."""
        own = np.arange(first, last)
        change = self.interactions[first:last, :, first:] - self._taken[first:last, None, first:]
        change -= self._taken[first:, first:last].transpose(1, 2, 0)[..., None]
        change += self._taken[own[:, None], self._groups[first:], self._pick[first:]][:, None, :, None]
        change += self._change[first:last, :, None, None]
        change += self._change[first:]
        change[own - first, :, own - first] = 0.0
        self.work += change.size
        flat = change.ravel()
        better = np.flatnonzero(flat < self._least)
        better = better[np.argsort(flat[better], kind="stable")]
        g, s, h, t = np.unravel_index(better, change.shape)
        fits = (self._added[g + first, s] + self._added[h + first, t] <= self._room).all(1)
        found = np.stack([g + first, s, h + first, t], 1)[fits]
        return any(self._apply((int(a), int(b)), (int(c), int(d))) for a, b, c, d in found)
