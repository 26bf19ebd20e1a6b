"""Genetic search and NSGA-II through pymoo, with feasible repair and seeds from the frontier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mpq.problem import Floats, Ints, Problem
from mpq.search.evaluations import Evaluations
from mpq.search.feasible import FeasiblePicks
from mpq.search.interaction import Interaction
from mpq.search.measured import MeasuredSearch
from mpq.search.pareto import convex_frontier
from mpq.search.rows import limit_shares


@dataclass(frozen=True)
class Genetic(MeasuredSearch):
    """Genetic algorithm: tournaments, uniform crossover, random changes of schemes, repair of infeasible picks.

    With ``Evaluations(problem.objective)`` it searches on the predicted loss.

    Attributes:
        seed: Random seed.
        population: Picks in a generation; they are measured at once.
        generations: It ends after so many.
        seeded: Half of the first generation are the predicted optimum and points of the predicted frontier; else all
            are random.
    """

    seed: int = 0
    population: int = 20
    generations: int = 1000
    seeded: bool = True
    name: ClassVar[str] = "genetic"
    needs: ClassVar[tuple[str, ...]] = ("pymoo",)

    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Evolve picks; see `MeasuredSearch.explore`."""
        feasible = FeasiblePicks(problem)
        first = self.first(feasible, np.random.default_rng(self.seed))

        def objectives(picks: Ints) -> Floats:
            return self._objectives(problem, picks, evaluations.measure(picks))

        count = self._objectives(problem, first[:1], np.zeros(1)).shape[1]
        done = len(evolve(feasible, first, objectives, count, self.generations, self.seed))
        return f"{done} generations" if done == self.generations else "no new picks could be bred"

    def _objectives(self, problem: Problem, picks: Ints, losses: Floats) -> Floats:
        """What is minimised, ``[K, objectives]``."""
        return losses[:, None]

    def first(self, feasible: FeasiblePicks, rng: np.random.Generator) -> Ints:
        """The first generation, all feasible."""
        drawn = feasible.draw(self.population, rng)
        seeds = self._seeds(feasible)[: self.population // 2] if self.seeded else drawn[:0]
        repaired = [feasible.repair(p, rng) for p in seeds]
        return np.array([*repaired, *drawn[len(seeds) :]], np.int64)

    def _seeds(self, feasible: FeasiblePicks) -> Ints:
        """The predicted optimum, then the frontier's points from the one next to the limits."""
        frontier = _frontier(feasible)
        order: Ints = np.argsort([-used_shares(feasible.problem, p).max(initial=0.0) for p in frontier], kind="stable")
        return np.concatenate([frontier[:1], frontier[order]])


@dataclass(frozen=True)
class Nsga2(Genetic):
    """NSGA-II (Deb et al., 2002): loss against how much of each constraint's limit is used.

    All points of the frontier below the limits are searched for; the least loss alone is what `Genetic` is for.

    Attributes:
        seed: Random seed.
        population: Picks in a generation; they are measured at once.
        generations: It ends after so many.
        seeded: Half of the first generation are points spread over the predicted frontier; else all are random.
    """

    name: ClassVar[str] = "nsga2"

    def _objectives(self, problem: Problem, picks: Ints, losses: Floats) -> Floats:
        return with_shares(problem, picks, losses)

    def _seeds(self, feasible: FeasiblePicks) -> Ints:
        frontier = _frontier(feasible)
        spread = np.unique(np.linspace(0, len(frontier) - 1, max(1, self.population // 2)).astype(int))
        return np.array([frontier[i] for i in spread])


def evolve(
    feasible: FeasiblePicks,
    first: Ints,
    objectives: Callable[[Ints], Floats],
    count: int,
    generations: int,
    seed: int,
) -> list[Ints]:
    """Evolve picks: pymoo's genetic algorithm for one objective, its NSGA-II for several.

    Args:
        feasible: Repairs picks.
        first: The first generation ``[population, G]``, feasible.
        objectives: What is minimised, of picks ``[K, G]``: ``[K, count]``.
        count: How many objectives.
        generations: It ends after so many, or when no new picks can be bred.
        seed: Random seed.

    Returns:
        The survivors of each generation ``[population, G]``.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.mutation import Mutation
    from pymoo.core.problem import Problem as Task
    from pymoo.core.repair import Repair
    from pymoo.operators.crossover.ux import UniformCrossover

    G, S = feasible.problem.loss.shape

    class Picks(Task):  # type: ignore[misc]
        def _evaluate(self, x: Ints, out: dict[str, Floats], *args: Any, **kwargs: Any) -> None:
            # Infinite losses have no order; pymoo's arithmetic does not take them.
            out["F"] = np.minimum(objectives(x), np.finfo(float).max)

    class OtherSchemes(Mutation):  # type: ignore[misc]
        def _do(self, problem: Any, X: Ints, random_state: Any = None, **kwargs: Any) -> Ints:
            others = random_state.integers(S, size=X.shape)
            return np.where(random_state.random(X.shape) < 1 / G, others, X)

    class MadeFeasible(Repair):  # type: ignore[misc]
        def _do(self, problem: Any, X: Ints, random_state: Any = None, **kwargs: Any) -> Ints:
            return np.array([feasible.repair(x, random_state) for x in X], np.int64)

    run = (GA if count == 1 else NSGA2)(
        pop_size=len(first),
        sampling=first,
        crossover=UniformCrossover(),
        mutation=OtherSchemes(),
        repair=MadeFeasible(),
        eliminate_duplicates=True,
    )
    run.setup(Picks(n_var=G, n_obj=count, xl=0, xu=S - 1, vtype=int), termination=("n_gen", generations), seed=seed)
    survivors = []
    while run.has_next():
        run.next()
        survivors.append(np.array(run.pop.get("X"), np.int64).reshape(-1, G))
    return survivors


def _frontier(feasible: FeasiblePicks) -> Ints:
    """The predicted optimum and the feasible points of the convex frontier of loss against the sum of all rows."""
    problem = feasible.problem
    points = convex_frontier(problem.loss, limit_shares(problem)).picks
    best = predicted_optimum(feasible)
    return np.array([best, *(p for p in points if problem.feasible(p))], np.int64)


def predicted_optimum(feasible: FeasiblePicks) -> Ints:
    """The best predicted pick that is found; the anchor if none is within the time limit."""
    found = Interaction().solve(feasible.problem).pick
    return feasible.anchor if found is None else found


def used_shares(problem: Problem, pick: Ints) -> Floats:
    """Share of each constraint's limit that a pick uses, in its fullest row ``[C]``."""
    usage = problem.usage(pick)
    limits = (np.maximum(np.abs(c.limit), 1e-300) for c in problem.constraints)
    return np.array([(usage[c.name] / x).max() for c, x in zip(problem.constraints, limits, strict=True)])


def with_shares(problem: Problem, picks: Ints, losses: Floats) -> Floats:
    """Losses and `used_shares` of picks as objectives, ``[K, 1 + C]``."""
    return np.column_stack([losses, np.array([used_shares(problem, p) for p in picks])])
