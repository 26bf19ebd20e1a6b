"""What searches on a learnt loss share: earlier studies, and the candidates that a prediction ranks best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem
from mpq.search.evaluations import Evaluations
from mpq.search.feasible import FeasiblePicks
from mpq.search.genetic import evolve
from mpq.search.ledger import Ledger

Predict = Callable[[Ints], Floats]
"""Predicted logarithms of the losses ``[K]`` of picks ``[K, G]``."""

_ENUMERATED = 4096  # picks of a problem that are all looked at
Attributes = Mapping[str, Sequence[Any]]
"""Name of an attribute, such as ``bits``, ``granularity`` or ``symmetric`` -> its value for each scheme.

Numbers are ordered: the closer two are, the more their schemes have in common."""

_TILT = 30.0  # largest logarithm of the odds of a group's dearest scheme against its cheapest
_ROUNDS = 10  # of draws for distinct training picks


@dataclass(frozen=True, eq=False)
class EarlierStudy:
    """Picks that were measured for another model (or under other conditions), to start a search with.

    Attributes:
        problem: What was searched; its constraints are not used.
        picks: Measured picks ``[N, G]``.
        losses: Their losses ``[N]``.

    Raises:
        MpqError: If picks and problem don't fit, or there are no picks.
    """

    problem: Problem
    picks: Ints
    losses: Floats

    def __post_init__(self) -> None:
        G, S = self.problem.loss.shape
        shape = np.shape(self.picks)
        picks = np.asarray(self.picks)
        if shape != (len(self.losses), G) or not ((picks >= 0) & (picks < S)).all():
            raise MpqError(f"picks {shape} of an earlier study don't fit its problem of {G} groups x {S} schemes")
        if not len(picks):
            raise MpqError("an earlier study without picks teaches nothing; leave it out")

    @classmethod
    def from_ledger(cls, problem: Problem, ledger: Ledger) -> EarlierStudy:
        """All that a ledger holds for its context.

        Raises:
            MpqError: If it holds nothing.
        """
        picks, losses = ledger.all()
        if not len(picks):
            raise MpqError(f"the ledger {ledger.path} has no evaluations of {ledger.context!r}")
        return cls(problem, picks, losses)


def best_predicted(
    feasible: FeasiblePicks,
    predict: Predict,
    evaluations: Evaluations,
    count: int,
    rng: np.random.Generator,
    population: int = 48,
    generations: int = 16,
) -> Ints:
    """Up to ``count`` feasible picks ``[K, G]`` that are not measured yet, the best predicted first.

    Small spaces are enumerated; in others, the best measured picks and random ones are evolved on the prediction.
    """
    picks = every_pick(feasible)
    if picks is None:
        first = starts(feasible, evaluations, population, rng)
        asked: dict[bytes, Ints] = {}

        def objective(x: Ints) -> Floats:
            asked.update((p.tobytes(), p) for p in np.asarray(x, np.int64))
            return predict(x)[:, None]

        evolve(feasible, first, objective, 1, generations, int(rng.integers(2**31)))
        picks = np.array(list(asked.values()), np.int64)
    new = picks[[not evaluations.known(p) for p in picks]]
    return new[np.argsort(predict(new), kind="stable")[:count]] if len(new) else new


def every_pick(feasible: FeasiblePicks) -> Ints | None:
    """All feasible picks ``[K, G]`` of a small space; None of a large one."""
    options = [np.flatnonzero(row).tolist() for row in feasible.problem.allowed]
    if math.prod(map(len, options)) > _ENUMERATED:
        return None
    picks = np.array(list(itertools.product(*options)), np.int64)
    return picks[feasible.fits(picks)]


def starts(feasible: FeasiblePicks, evaluations: Evaluations, count: int, rng: np.random.Generator) -> Ints:
    """Picks ``[count, G]`` to evolve: half the best measured ones (as far as there are), the others random."""
    trace = evaluations.trace
    order = np.argsort(trace.losses, kind="stable")
    fitting = [p for p in trace.picks[order] if feasible.problem.feasible(p)][: count // 2]
    return np.array([*fitting, *feasible.draw(count - len(fitting), rng)], np.int64)


def training_picks(feasible: FeasiblePicks, count: int, rng: np.random.Generator, crowding: float = 1.0) -> Ints:
    """Up to ``count`` different feasible picks ``[K, G]``, spread from the least cost to the limits.

    As in EQ-Net (Xu et al., 2023, after OFA), where schemes are random given the average bits: here with the
    distribution of the largest entropy for an average cost. Evenly drawn schemes would all cost about the same.

    Args:
        feasible: Makes them feasible.
        count: How many.
        rng: Where draws come from.
        crowding: 1 spreads them evenly; the larger, the more of them lie near the limits.
    """
    from scipy.optimize import brentq

    cost, allowed = _relative_cost(feasible.problem), feasible.problem.allowed
    largest = np.where(allowed, cost, 0.0).max(1)
    sizes = cost / np.where(largest > 0, largest, 1.0)[:, None]

    def chances(tilt: float) -> Floats:
        weights = np.where(allowed, np.exp(tilt * (sizes - 0.5)), 0.0)
        found: Floats = weights / weights.sum(1, keepdims=True)
        return found

    def mean(tilt: float) -> float:
        return float((chances(tilt) * cost).sum())

    least, most = mean(-_TILT), min(mean(_TILT), max(1.0, mean(-_TILT)))
    found: dict[bytes, Ints] = {}
    for _ in range(_ROUNDS):
        missing = count - len(found)
        places = ((rng.permutation(missing) + rng.random(missing)) / max(missing, 1)) ** (1 / crowding)
        for target in least + (most - least) * places:
            tilt = brentq(lambda t, goal=target: mean(t) - goal, -_TILT, _TILT) if least < target < most else 0.0
            rows = chances(tilt)
            pick = feasible.repair([rng.choice(len(row), p=row) for row in rows], rng)
            found[pick.tobytes()] = pick
    return np.array(list(found.values()), np.int64).reshape(-1, len(cost))


def _relative_cost(problem: Problem) -> Floats:
    """Costs ``[G, S]`` as shares of the limits, on average over the rows; zero without any."""
    G, S = problem.loss.shape
    cost = np.concatenate([np.zeros((G, S, 0)), *(c.cost for c in problem.constraints)], axis=2)
    limit = np.concatenate([np.zeros(0), *(c.limit for c in problem.constraints)])
    largest = np.where(problem.allowed[..., None], cost, 0.0).max(1).sum(0)
    bounded = np.isfinite(limit) & (limit > 0) & (largest > 0)
    shares: Floats = (cost / np.where(bounded, limit, 1.0))[..., bounded].sum(2) / max(int(bounded.sum()), 1)
    return shares
