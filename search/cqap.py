"""CQAP: train a loss predictor on random picks once, evolve picks on it, measure the best predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpq.problem import Problem
from mpq.search.evaluations import Evaluations
from mpq.search.feasible import FeasiblePicks
from mpq.search.measured import MeasuredSearch
from mpq.search.surrogate import Attributes, best_predicted, training_picks

_CROWDING = 4.0  # what is searched lies at the limits
_TRAINING_SHARE = 0.75  # of a limit of evaluations


@dataclass(frozen=True)
class Cqap(MeasuredSearch):
    """Genetic search on a conditional quantization-aware predictor (CQAP of EQ-Net: Xu et al., 2023, section 3.3).

    The predictor is conditioned on what schemes are made of: bits, granularity and symmetry, by `attributes`, or for
    the whole network as `Choices`. Its rank correlation on held-out picks is in the message of the solution.

    Attributes:
        seed: Random seed.
        training: Picks that the predictor learns from (`mpq.search.surrogate.training_picks`), at most three quarters
            of a limit of evaluations.
        finalists: Best predicted picks that are then measured, fewer if the limit is.
        population: Picks in a generation of the search on the predictor.
        generations: Of that search.
        seeded: The predictor corrects the predicted losses; else it knows nothing in advance.
        attributes: Name -> value for each scheme.
    """

    seed: int = 0
    training: int = 128
    finalists: int = 64
    population: int = 100
    generations: int = 40
    seeded: bool = True
    attributes: Attributes | None = None
    name: ClassVar[str] = "cqap"
    needs: ClassVar[tuple[str, ...]] = ("pymoo",)

    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Measure random picks, learn, evolve, measure the best; see `MeasuredSearch.explore`."""
        from mpq.search.predictor import LossPredictor  # imports scipy

        rng, feasible = np.random.default_rng(self.seed), FeasiblePicks(problem)
        predictor = LossPredictor(problem, self.attributes, seeded=self.seeded)
        count = max(1, int(min(self.training, _TRAINING_SHARE * evaluations.left)))
        evaluations.measure(training_picks(feasible, count, rng, _CROWDING))
        trace = evaluations.trace
        correlation = predictor.held_out(trace.picks, trace.losses, rng)
        predictor.learn(trace.picks, trace.losses)
        finalists = int(min(self.finalists, evaluations.left))
        picks = best_predicted(
            feasible, predictor.predict, evaluations, finalists, rng, self.population, self.generations
        )
        if len(picks):
            evaluations.measure(picks)
        learnt = f"learnt from {len(trace)} picks"
        if math.isnan(correlation):
            return f"{learnt}, too few to tell how well"
        wrong = f"{(1 - correlation) / 2:.1%} of held-out pairs in the wrong order"
        return f"{learnt}, {wrong} (Kendall's tau {correlation:.3f})"
