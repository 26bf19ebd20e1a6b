"""What other tools do, under names of their own: to be compared with, not to be used. None proves anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem, Solution, Status, solved
from mpq.search.pareto import extend_frontier

_MOST_SEQUENCES = 2_000_000


@dataclass(frozen=True)
class Uniform:
    """One scheme for all groups: the one of least loss that meets every constraint."""

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem; groups that may not have the scheme rule it out."""
        started = time.perf_counter()
        G, S = problem.loss.shape
        return _best(problem, (np.full(G, s) for s in range(S)), started, "uniform")


@dataclass(frozen=True)
class GreedyRatio:
    """Two schemes: groups that lose least get the cheaper one until the constraints hold (NNCF's weight compression).

    Every pair of schemes is tried and the best pick returned. Interactions are ignored.
    """

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem."""
        started = time.perf_counter()

        def picks() -> Iterator[Ints]:
            for low, high in combinations(range(problem.loss.shape[1]), 2):
                for cheap, good in ((low, high), (high, low)):
                    if problem.allowed[:, [cheap, good]].all():
                        order = np.argsort(problem.loss[:, cheap] - problem.loss[:, good], kind="stable")
                        yield from _until_feasible(problem, good, [(g, cheap) for g in order])

        return _best(problem, picks(), started, "greedy ratio")


@dataclass(frozen=True)
class GreedyPath:
    """One path from the least loss on: single steps by rising loss, until the constraints hold (AIMET's AMP).

    Every (group, scheme) is ranked once by what it alone loses; a step that makes nothing cheaper is passed over.
    Interactions are ignored.
    """

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem."""
        started = time.perf_counter()
        rise = problem.loss - problem.loss.min(1, keepdims=True)
        order = np.argsort(rise, axis=None, kind="stable")
        steps = [divmod(int(i), rise.shape[1]) for i in order if np.isfinite(rise.flat[i])]
        best = problem.loss.argmin(1)
        return _best(problem, _until_feasible(problem, best, steps), started, "greedy path")


@dataclass(frozen=True)
class BeamDp:
    """Dynamic program over the summed cost with a limited beam of states (AutoRound's AutoScheme).

    Attributes:
        beam: States kept after each group, evenly along their list by rising cost.
    """

    beam: int = 1000

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem with one constraint of one row.

        Raises:
            MpqError: If it has others, or interactions.
        """
        started = time.perf_counter()
        if problem.interactions is not None or len(problem.constraints) != 1 or problem.constraints[0].limit.size != 1:
            raise MpqError("the beam takes one constraint with one row and no interactions; use the interaction solver")
        cost, limit = problem.constraints[0].cost[..., 0], float(problem.constraints[0].slack_limit[0])
        costs, losses = np.zeros(1), np.zeros(1)
        history: list[tuple[Ints, Ints]] = []
        for g in range(len(cost)):
            schemes = np.flatnonzero(problem.allowed[g])
            added = cost[g, schemes], problem.loss[g, schemes]
            costs, losses, _, parent, choice = extend_frontier(costs, losses, *added)
            if len(costs) > self.beam:
                keep = np.unique(np.linspace(0, len(costs) - 1, self.beam).astype(int))
                costs, losses, parent, choice = costs[keep], losses[keep], parent[keep], choice[keep]
            history.append((parent, schemes[choice]))
        fits = np.flatnonzero(costs <= limit)
        if not len(fits):
            return _best(problem, iter(()), started, "beam")
        state, pick = int(fits[losses[fits].argmin()]), np.zeros(len(cost), np.int64)
        for g in range(len(cost) - 1, -1, -1):
            parent, scheme = history[g]
            pick[g], state = scheme[state], parent[state]
        return _best(problem, iter([pick]), started, "beam")


@dataclass(frozen=True)
class OrderedEnumeration:
    """All picks whose schemes fall from the most to the least sensitive group (HAWQ-V2's Pareto enumeration).

    Groups are sorted by their losses, schemes by their total loss; with G groups and S schemes there are
    ``(G + S - 1 over S - 1)`` such picks, summed up from running totals. Interactions are ignored in the choice.
    """

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem in which all groups have the same schemes.

        Raises:
            MpqError: If they don't, or there are more than two million picks.
        """
        started = time.perf_counter()
        G = len(problem.loss)
        usable = np.flatnonzero(problem.allowed.all(0))
        if not len(usable) or (problem.allowed.any(0) != problem.allowed.all(0)).any():
            raise MpqError("the ordered enumeration needs the same schemes for all groups")
        usable = usable[np.argsort(problem.loss[:, usable].sum(0), kind="stable")]
        groups = np.argsort(-problem.loss.sum(1, where=problem.allowed), kind="stable")
        cuts = np.array(list(_cuts(G, len(usable))), np.int64)
        loss = _totals(problem.loss[groups][:, usable], cuts)
        fits = np.ones(len(cuts), bool)
        for c in problem.constraints:
            for r, limit in enumerate(c.slack_limit):
                fits &= _totals(c.cost[groups][:, usable, r], cuts) <= limit
        order = np.flatnonzero(fits)[np.argsort(loss[fits], kind="stable")]

        def picks() -> Iterator[Ints]:
            for i in order[:10]:  # running totals may be off by rounding: some are checked
                pick = np.empty(G, np.int64)
                pick[groups] = np.repeat(usable, np.diff(cuts[i]))
                yield pick

        return _best(problem, picks(), started, "ordered enumeration")


def _cuts(groups: int, schemes: int) -> Iterator[tuple[int, ...]]:
    """Where in the order of groups each scheme ends: rising tuples from 0 to ``groups``."""
    if comb(groups + schemes - 1, schemes - 1) > _MOST_SEQUENCES:
        raise MpqError(f"{groups} groups with {schemes} schemes have over {_MOST_SEQUENCES:,} ordered picks")
    for bars in combinations(range(groups + schemes - 1), schemes - 1):
        yield (0, *(b - i for i, b in enumerate(bars)), groups)


def _totals(values: Floats, cuts: Ints) -> Floats:
    """Sums over groups of ``values [G, S]`` for each row of cuts."""
    running = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values, 0)])
    ends = pairwise(range(cuts.shape[1]))
    total: Floats = np.sum([running[cuts[:, b], s] - running[cuts[:, a], s] for s, (a, b) in enumerate(ends)], axis=0)
    return total


def _until_feasible(problem: Problem, start: Ints | int, steps: list[tuple[int, int]]) -> Iterator[Ints]:
    """The first feasible pick on a path of steps that each lower some cost."""
    pick = np.full(len(problem.loss), start, np.int64) if np.isscalar(start) else np.array(start, np.int64)
    if problem.feasible(pick):
        yield pick
        return
    for g, s in steps:
        cheaper = any((c.cost[g, s] < c.cost[g, pick[g]]).any() for c in problem.constraints)
        if cheaper:
            pick[g] = s
            if problem.feasible(pick):
                yield pick
                return


def _best(problem: Problem, picks: Iterator[Ints], started: float, solver: str) -> Solution:
    """The feasible pick of least objective, without any proof."""
    feasible = [p for p in picks if problem.feasible(p)]
    seconds = time.perf_counter() - started
    if not feasible:
        message = f"{solver} finds no pick within the limits; another solver may"
        return Solution(Status.NO_SOLUTION, None, np.inf, -np.inf, {}, seconds, solver, {}, message)
    return solved(problem, min(feasible, key=problem.objective), -np.inf, seconds, solver)
