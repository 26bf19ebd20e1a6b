"""Exhaustive search: the slow, obvious twin that the other solvers are held to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Solution, infeasible, solved

_CHUNK = 2**16


@dataclass(frozen=True)
class Exhaustive:
    """Tries every pick.

    Attributes:
        max_picks: Refuse problems with more picks than this.
    """

    max_picks: int = 5_000_000

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem with any constraints.

        Raises:
            MpqError: If there are too many picks.
        """
        started = time.perf_counter()
        best, best_loss = None, np.inf
        for picks in self.all_picks(problem):
            loss = totals(problem, picks)
            for i in np.flatnonzero(loss < best_loss):
                if loss[i] < best_loss and problem.feasible(picks[i]):
                    best, best_loss = picks[i], loss[i]
        seconds = time.perf_counter() - started
        if best is None:
            return infeasible(problem, seconds, "exhaustive")
        return solved(problem, best, best_loss, seconds, "exhaustive", proven=True)

    def all_picks(self, problem: Problem) -> Iterator[Ints]:
        """All picks, allowed or not, in chunks ``[n, G]``.

        Raises:
            MpqError: If there are too many.
        """
        G, S = problem.loss.shape
        total = S**G
        if total > self.max_picks:
            raise MpqError(f"{S}**{G} picks are too many for exhaustive search (at most {self.max_picks:,})")
        for first in range(0, total, _CHUNK):
            index = np.arange(first, min(total, first + _CHUNK))
            yield np.stack(np.unravel_index(index, (S,) * G), 1) if G else np.zeros((1, 0), np.int64)


def totals(problem: Problem, picks: Ints) -> Floats:
    """Total losses of many picks ``[n, G]``, interactions included ``[n]``."""
    groups = np.arange(len(problem.loss))
    found: Floats = problem.loss[groups, picks].sum(1)
    if problem.interactions is not None:
        for g in groups:
            found = found + problem.interactions[g, picks[:, [g]], groups[:g], picks[:, :g]].sum(1)
    return found
