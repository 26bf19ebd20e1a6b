"""LINAS: learn the loss, evolve a frontier on the prediction, measure its best, and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mpq.problem import Floats, Ints, Problem
from mpq.search.evaluations import Evaluations
from mpq.search.feasible import FeasiblePicks
from mpq.search.genetic import Nsga2, evolve, with_shares
from mpq.search.logs import logarithms
from mpq.search.measured import MeasuredSearch
from mpq.search.surrogate import Attributes, training_picks

if TYPE_CHECKING:
    from mpq.search.predictor import LossPredictor

_REFERENCE = 1.1  # of hypervolumes, in ranges of each objective


@dataclass(frozen=True)
class Linas(MeasuredSearch):
    """Lightweight iterative search of SimQ-NAS (Sridhar et al., 2022 and 2023): a frontier in few evaluations.

    The loss and how much of each constraint's limit is used are minimised: two objectives under one constraint, three
    under two. In each round a predictor (`LossPredictor`) learns all measured losses, NSGA-II evolves the best of them
    on its predictions, and of its last generation those are measured that add most hypervolume to what is measured.

    Attributes:
        seed: Random seed.
        initial: Picks measured before the first round.
        batch: Picks measured in each round, the one of the least predicted loss among them.
        rounds: It ends after so many, or when no new picks are found.
        population: Picks in a generation of NSGA-II.
        generations: Of each NSGA-II.
        seeded: The predictor corrects the predicted losses, and half of the initial picks are of the predicted
            frontier; else it knows nothing in advance.
        attributes: Name -> value for each scheme: what the predictor is conditioned on.
    """

    seed: int = 0
    initial: int = 16
    batch: int = 8
    rounds: int = 100
    population: int = 60
    generations: int = 20
    seeded: bool = True
    attributes: Attributes | None = None
    name: ClassVar[str] = "linas"
    needs: ClassVar[tuple[str, ...]] = ("pymoo",)

    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Measure, learn, evolve, repeat; see `MeasuredSearch.explore`."""
        from mpq.search.predictor import LossPredictor  # imports scipy

        rng, feasible = np.random.default_rng(self.seed), FeasiblePicks(problem)
        predictor = LossPredictor(problem, self.attributes, seeded=self.seeded)
        first = training_picks(feasible, self.initial, rng)
        if self.seeded:
            seeds = Nsga2(population=self.initial).first(feasible, rng)[: self.initial // 2]
            first = np.concatenate([seeds, first[: self.initial - len(seeds)]])
        evaluations.measure(first)
        for _ in range(self.rounds):
            trace = evaluations.trace
            predictor.learn(trace.picks, trace.losses)
            picks = self._proposed(feasible, predictor, evaluations, rng)
            if not len(picks):
                return "no new picks are on the predicted frontier"
            evaluations.measure(picks)
        return f"{self.rounds} rounds"

    def _proposed(
        self, feasible: FeasiblePicks, predictor: LossPredictor, evaluations: Evaluations, rng: np.random.Generator
    ) -> Ints:
        """Picks to measure ``[K, G]``."""
        problem = feasible.problem

        def objectives(picks: Ints) -> Floats:
            return with_shares(problem, picks, predictor.predict(picks))

        trace = evaluations.trace
        fits = feasible.fits(trace.picks)
        measured = with_shares(problem, trace.picks, logarithms(trace.losses))[fits]
        front = front_first(measured)[: self.population // 2]
        others = training_picks(feasible, self.population - len(front), rng)
        first = np.concatenate([trace.picks[fits][front], others])
        found = evolve(feasible, first, objectives, measured.shape[1], self.generations, int(rng.integers(2**31)))[-1]
        new = found[[not evaluations.known(p) for p in found]]
        return new[most_volume(objectives(new), measured[front], self.batch)] if len(new) else new


def front_first(objectives: Floats) -> Ints:
    """Order ``[N]`` of points ``[N, objectives]``: those that none dominates, then those that only these do, etc."""
    from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

    fronts = NonDominatedSorting().do(objectives)
    return np.concatenate([np.sort(front) for front in fronts]).astype(np.int64)


def most_volume(points: Floats, known: Floats, count: int) -> Ints:
    """Indices ``[K]`` of up to ``count`` points ``[N, objectives]`` that extend a front.

    That is the best in the first objective, then always the one that adds most hypervolume to those chosen and to known
    points ``[M, objectives]``.
    """
    from pymoo.indicators.hv import HV

    both = np.concatenate([points, known])
    low, scale = both.min(0), np.maximum(np.ptp(both, axis=0), 1e-12)
    own, front = (points - low) / scale, (known - low) / scale
    volume = HV(ref_point=np.full(points.shape[1], _REFERENCE))
    chosen = [int(own[:, 0].argmin())]
    while len(chosen) < min(count, len(points)):
        front = np.concatenate([front, own[chosen[-1:]]])
        gains = [-1.0 if i in chosen else volume(np.concatenate([front, own[i : i + 1]])) for i in range(len(own))]
        chosen.append(int(np.argmax(gains)))
    return np.array(chosen, np.int64)
