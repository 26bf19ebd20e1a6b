"""Quadratic multiple-choice problems: losses that depend on pairs of choices, under any number of constraints."""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, replace
from itertools import count, product

import numpy as np
from numpy.typing import NDArray

from mpq.problem import Floats, Ints, Problem, Solution, solved
from mpq.search.exhaustive import totals
from mpq.search.ilp import Ilp
from mpq.search.knapsack import Knapsack
from mpq.search.linearized import dual_prices
from mpq.search.local_search import LocalSearch
from mpq.search.psd_bound import PsdBound, separable_bound
from mpq.search.rows import fitting

Mask = NDArray[np.bool_]

# Work per second of the time limit, two thirds of what a core does: pair moves of the local search, and cubed sizes of
# the matrices of the relaxation. Counting work and not seconds makes runs reproducible.
_MOVES, _CUBES, _OVERHEAD = 1.5e7, 6e8, 1e6
_FEWEST = 5  # iterations of the relaxation that must fit into the work, else it is not begun
_LISTED = 5000  # picks that are quicker tried one by one than bounded
_LINEARIZED = 12  # starts from linearized objectives; a third of them if each needs an integer program
_MAX_ROWS = 6  # of the relaxation: those with the least room
_ITERATIONS = 20  # per round
_ROOT, _NODE = (30, 0.02), (6, 0.1)  # most rounds, and the share of the gap that a round must close to go on
_ROUNDING = 1e-11


@dataclass(frozen=True)
class Interaction:
    """Solver for problems with interactions; those without go to the knapsack or the integer program.

    1. Local search by single and paired changes, from optima of linearized objectives and then from random kicks.
    2. Branch and bound with a semidefinite bound (`mpq.search.psd_bound`), which drops schemes that no better pick
       has. When it ends, the pick is proven optimal, else it is `FEASIBLE` with the bound reached.

    Dual prices are those of the linear relaxation of what changing each group alone does to the answer.

    Attributes:
        time_limit: Seconds. Work is counted so that it usually ends before; then the same seed gives the same answer.
            As with `Ilp`, a first feasible pick is looked for beyond it.
        restarts: Kicks of the local search; large problems do fewer.
        seed: Random seed of the kicks.

    Example:
        Errors of the two groups cancel if both have their second scheme.

        >>> from mpq.problem import Problem
        >>> pairs = np.zeros((2, 2, 2, 2))
        >>> pairs[0, 1, 1, 1] = pairs[1, 1, 0, 1] = -0.5
        >>> solution = Interaction().solve(Problem([[0.1, 0.3], [0.1, 0.2]], (), pairs))
        >>> solution.pick.tolist(), round(solution.objective, 12), solution.status.value
        ([1, 1], 0.0, 'optimal')
    """

    time_limit: float = 10.0
    restarts: int = 200
    seed: int = 0

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem with any constraints."""
        started = time.perf_counter()
        separable = Problem(problem.loss, problem.constraints)
        if problem.interactions is None or not problem.interactions.any():
            return separable_solver(separable, self.time_limit).solve(separable)
        first = separable_solver(separable, self.time_limit / 4).solve(separable)
        if first.pick is None:
            return replace(first, solver="interaction", seconds=time.perf_counter() - started)
        search = LocalSearch(symmetric(problem), started + 0.95 * self.time_limit)
        tree = BranchAndBound(search, first.pick, _CUBES * self.time_limit)
        if not tree.small:
            starts = self._linearized(search.problem, first.pick, started + self.time_limit / 4)
            until = started + (0.9 if tree.large else 0.5) * self.time_limit
            rng = np.random.default_rng(self.seed)
            tree.offer(search.search(starts, self.restarts, _MOVES * self.time_limit, until, rng))
        proven = tree.run()
        prices = dual_prices(search.problem, tree.pick, started + self.time_limit)
        seconds = time.perf_counter() - started
        return solved(problem, tree.pick, tree.bound, seconds, "interaction", prices, proven=proven)

    def _linearized(self, problem: Problem, pick: Ints, deadline: float) -> list[Ints]:
        """Picks that are optimal for the objective linearized at the mean of those before (Frank and Wolfe, 1956)."""
        assert problem.interactions is not None
        G, S = problem.loss.shape
        square: Floats = problem.interactions.reshape(G * S, G * S)
        picks, mean = [pick], np.eye(S)[pick].ravel()
        solver = separable_solver(problem, self.time_limit / 20)
        for i in range(_LINEARIZED if isinstance(solver, Knapsack) else _LINEARIZED // 3):
            found = solver.solve(Problem(problem.loss + (square @ mean).reshape(G, S), problem.constraints))
            if found.pick is None or time.perf_counter() > deadline:
                break
            picks.append(found.pick)
            mean += (np.eye(S)[found.pick].ravel() - mean) * 2 / (i + 3)
        return sorted({p.tobytes(): p for p in picks}.values(), key=problem.objective)


class BranchAndBound:
    """Best-first branch and bound from a feasible pick.

    Args:
        search: Has the problem and the deadline, and improves picks.
        pick: A feasible pick.
        max_work: Work (see the module's constants) after which the run ends.

    Attributes:
        pick: Best pick so far.
        bound: Lower bound of the optimum.
        small: There are few picks: all are tried.
        large: There are so many choices that the relaxation would take too long: only a simple bound is made.
    """

    def __init__(self, search: LocalSearch, pick: Ints, max_work: float) -> None:
        self.problem, self._search, self._work = search.problem, search, max_work
        self._interactions, self._cost, self._limit = search.interactions, search.cost, search.limit
        self._keep = self._fitting(self.problem.allowed)
        self.small = _few(self._keep)
        self.large = max_work < _FEWEST * (int(self._keep.sum()) - len(pick)) ** 3
        self.pick, self._objective, self.bound = pick, self.problem.objective(pick), -np.inf

    def offer(self, pick: Ints) -> None:
        """Take a feasible pick if it is better."""
        objective = self.problem.objective(pick)
        if objective < self._objective:
            self.pick, self._objective = pick, objective

    def run(self) -> bool:
        """Search until the pick is proven optimal (True) or time or work ends (False)."""
        if self.small:
            self._try_all(self._keep)
            return True
        groups = np.arange(len(self.pick))
        taken = self._interactions[groups[:, None], self.pick[:, None], groups, self.pick]
        terms = float(np.abs(self.problem.loss[groups, self.pick]).sum() + 0.5 * np.abs(taken).sum())
        self._scale = max(abs(self._objective), 0.2 * terms) or 1.0
        self.bound = self._simple_bound() - _ROUNDING * self._scale
        if self.large:
            return False
        order = count()
        heap = [(self.bound / self._scale, next(order), self._root(), self._keep)]
        while heap:
            low, _, node, keep = heapq.heappop(heap)
            if low >= self._top:
                break
            if self._spent():
                self.bound = max(self.bound, (low - _ROUNDING) * self._scale)
                return False
            for child_low, parent, child in self._branches(low, node.narrowed(keep) if node.keep is not keep else node):
                heapq.heappush(heap, (child_low, next(order), parent, child))
        return True

    def _spent(self) -> bool:
        return self._work <= 0 or time.perf_counter() > self._search.deadline

    @property
    def _top(self) -> float:
        """What a bound must reach for no better pick to be left."""
        return self._objective / self._scale - _ROUNDING

    def _root(self) -> PsdBound:
        room = self._limit - self._cost[np.arange(len(self.pick)), self.pick].sum(0)
        span = (self._cost.max(1) - self._cost.min(1)).sum(0)
        rows = np.sort(np.argsort(room / span, kind="stable")[:_MAX_ROWS])
        loss, interactions = self.problem.loss / self._scale, self._interactions / self._scale
        return PsdBound(loss, interactions, self._cost[..., rows], self._limit[rows], self._keep)

    def _branches(self, low: float, node: PsdBound) -> list[tuple[float, PsdBound, Mask]]:
        """Bound a node; its children with their bounds, none if it holds no better pick."""
        rounds, worthwhile = _ROOT if node.keep is self._keep else _NODE
        for i in range(rounds):
            before = low
            work = node.size**3 + _OVERHEAD
            iterations = int(min(_ITERATIONS, max(1, self._work // work)))
            self._work -= iterations * work
            node.iterate(iterations, self._search.deadline)
            value, forced = node.bound()
            low = max(low, value)
            keep = self._fitting(node.keep & (forced < self._top))
            if low >= self._top or not keep.any(1).all():
                return []
            if _few(keep):
                self._try_all(keep)
                return []
            stalled = i > 0 and low - before < worthwhile * (self._top - low)
            if stalled or self._spent():
                break
            node = node if keep.sum() == node.keep.sum() else node.narrowed(keep)
        share = node.share()
        pick = share.argmax(1)
        if self.problem.feasible(pick):
            self.offer(self._search.descend(pick))
        largest = np.where(keep.sum(1) > 1, share.max(1), np.inf)
        g = int(largest.argmin())  # the group that the relaxation is least sure of
        return [(max(low, float(forced[g, s])), node, _fixed(keep, g, int(s))) for s in np.flatnonzero(keep[g])]

    def _fitting(self, keep: Mask) -> Mask:
        return fitting(keep, self._cost, self._limit)

    def _try_all(self, keep: Mask) -> None:
        """Offer the best of all picks of these schemes."""
        fixed = keep.argmax(1)
        free = np.flatnonzero(keep.sum(1) > 1)
        rest = np.setdiff1d(np.arange(len(keep)), free)
        options = [np.flatnonzero(keep[g]) for g in free]
        chosen = np.array(list(product(*options)), np.int64)
        loss = self.problem.loss[free] + self._interactions[free][:, :, rest, fixed[rest]].sum(2)
        between = self._interactions[free][:, :, free]
        offset = totals(Problem(loss, (), between), chosen)
        picks = np.repeat(fixed[None], len(chosen), 0)
        picks[:, free] = chosen
        fits = (self._cost[np.arange(len(keep)), picks].sum(1) <= self._limit).all(1)  # but for costs of pairs
        for i in np.argsort(offset, kind="stable"):
            if fits[i] and self.problem.feasible(picks[i]):
                self.offer(picks[i])
                return

    def _simple_bound(self) -> float:
        """Each group takes half of its interactions, at their least."""
        allowed = self.problem.allowed
        halves = np.array([np.where(allowed, pairs, np.inf).min(2).sum(1) for pairs in self._interactions]) / 2
        value, _ = separable_bound(self.problem.loss + halves, self._cost, self._limit)
        return value


def separable_solver(problem: Problem, seconds: float = 60.0) -> Knapsack | Ilp:
    """The exact solver without interactions: the knapsack for one row, the integer program for several or for pairs."""
    rows = sum(c.cost.shape[2] for c in problem.constraints)
    pairs = any(c.pairs is not None for c in problem.constraints)
    return Ilp(time_limit=seconds) if rows > 1 or pairs else Knapsack(time_limit=seconds)


def solver_for(problem: Problem, seconds: float) -> Knapsack | Ilp | Interaction:
    """The solver for any problem, with a time limit."""
    return separable_solver(problem, seconds) if problem.interactions is None else Interaction(seconds)


def _few(keep: Mask) -> bool:
    return bool(np.log(keep.sum(1)).sum() <= np.log(_LISTED))


def _fixed(keep: Mask, g: int, s: int) -> Mask:
    found = keep.copy()
    found[g] = False
    found[g, s] = True
    return found


def symmetric(problem: Problem) -> Problem:
    """The problem with interactions symmetric to the last bit: what counts is the mean of both halves."""
    if problem.interactions is None:
        return problem
    G, S = problem.loss.shape
    square: Floats = problem.interactions.reshape(G * S, G * S)
    if (square == square.T).all():
        return problem
    return replace(problem, interactions=((square + square.T) / 2).reshape(G, S, G, S))
