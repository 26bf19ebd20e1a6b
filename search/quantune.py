"""Quantune: gradient-boosted trees learn the loss of picks, also from earlier studies of other models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mpq.problem import Floats, Ints, Problem
from mpq.search.evaluations import Evaluations
from mpq.search.feasible import FeasiblePicks
from mpq.search.genetic import Genetic
from mpq.search.logs import logarithms, predicted_shares
from mpq.search.measured import MeasuredSearch
from mpq.search.surrogate import EarlierStudy, best_predicted

if TYPE_CHECKING:
    from xgboost import Booster

_TREES = 80
_SETTINGS = {"eta": 0.15, "max_depth": 3, "min_child_weight": 1, "nthread": 1, "seed": 0, "verbosity": 0}
_DEPTHS = 8  # points at which the profile of a pick along the network is taken


@dataclass(frozen=True)
class Quantune(MeasuredSearch):
    """XGBoost surrogate (Quantune: Lee et al., 2022, section 4): learn, measure the best predicted, repeat.

    Per-layer schemes and global choices (`Choices`) are searched alike. With earlier studies, trees learn those first,
    in terms that models share, and what is measured corrects them: the first picks are then the best predicted.

    Attributes:
        seed: Random seed.
        initial: Picks measured before the first trees are grown, if there are no earlier studies.
        batch: Picks measured at once, the published top 5. One of them is random: the trees may be wrong everywhere.
        rounds: It ends after so many batches.
        seeded: The trees correct the predicted losses, and half of the initial picks are of the predicted frontier;
            else nothing is known in advance and all of those are random.
        earlier: Studies of other models.

    Example:
        Trees that know nothing of the losses in advance.

        >>> from mpq.problem import Constraint, Problem
        >>> from mpq.search import Evaluations
        >>> bits = np.array([2.0, 4.0, 8.0])
        >>> size = Constraint("size", "bits", np.tile(bits, (5, 1)), 20.0)
        >>> problem = Problem(np.outer([1.0, 2.0, 4.0, 8.0, 16.0], 4.0**-bits), (size,))
        >>> def measure(pick):
        ...     return float(np.dot([1.0, 2.0, 50.0, 8.0, 16.0], 4.0 ** -bits[pick]))
        >>> found = Quantune(seeded=False, initial=8).search(problem, Evaluations(measure, limit=40))
        >>> found.evaluations, found.pick.tolist()
        (40, [0, 0, 2, 1, 1])
    """

    seed: int = 0
    initial: int = 16
    batch: int = 5
    rounds: int = 1000
    seeded: bool = True
    earlier: tuple[EarlierStudy, ...] = ()
    name: ClassVar[str] = "quantune"
    needs: ClassVar[tuple[str, ...]] = ("xgboost", "pymoo")

    def explore(self, problem: Problem, evaluations: Evaluations) -> str:
        """Measure, learn, repeat; see `MeasuredSearch.explore`."""
        rng, feasible = np.random.default_rng(self.seed), FeasiblePicks(problem)
        trees = Trees(problem, self.earlier, seeded=self.seeded)
        if not self.earlier:
            evaluations.measure(Genetic(self.seed, self.initial, seeded=self.seeded).first(feasible, rng))
        for _ in range(self.rounds):
            trace = evaluations.trace
            trees.learn(trace.picks.reshape(-1, len(problem.loss)), trace.losses)
            picks = best_predicted(feasible, trees.predict, evaluations, self.batch, rng)
            if not len(picks):
                return "no new picks are left"
            if len(picks) == self.batch > 1:
                picks[-1] = feasible.draw(1, rng)[0]
            evaluations.measure(picks)
        return f"{self.rounds} rounds"


class Trees:
    """Boosted trees for the logarithm of the loss, or for what a prediction is wrong by.

    Args:
        problem: Whose picks are learnt.
        earlier: Studies whose loss is learnt first; the own losses then correct it.
        seeded: The predicted loss is what the trees correct.
    """

    def __init__(self, problem: Problem, earlier: Sequence[EarlierStudy] = (), *, seeded: bool = True) -> None:
        self._problem, self._seeded = problem, seeded
        self._own: Booster | None = None
        self._before = self._learn_earlier(earlier) if earlier else None

    def learn(self, picks: Ints, losses: Floats) -> None:
        """Learn the measured losses ``[N]`` of own picks ``[N, G]``."""
        if len(picks):
            features, base = self._known(picks)
            self._own = _grow(features, logarithms(losses) - base)

    def predict(self, picks: Ints) -> Floats:
        """Logarithm of the loss, up to a constant, of own picks ``[K, G]``."""
        features, found = self._known(picks)
        if self._own is not None:
            found = found + _predicted(self._own, features)
        return found

    def _known(self, picks: Ints) -> tuple[Floats, Floats]:
        """Features ``[K, F]`` of own picks and what is known before any is measured ``[K]``."""
        shared, base = _shared(self._problem, picks, self._seeded)
        features = np.concatenate([shared, _chosen(self._problem, picks)], 1)
        if self._before is not None:
            base = base + _predicted(self._before, features)
        return features, base

    def _learn_earlier(self, earlier: Sequence[EarlierStudy]) -> Booster:
        features, targets = [], []
        for study in earlier:
            shared, base = _shared(study.problem, study.picks, self._seeded)
            # Choices can be compared one by one only if the studies have the same; trees take NaN for unknown.
            same = study.problem.loss.shape == self._problem.loss.shape
            chosen = (
                _chosen(self._problem, study.picks) if same else np.full((len(base), self._problem.loss.size), np.nan)
            )
            features.append(np.concatenate([shared, chosen], 1))
            target = logarithms(study.losses) - base
            targets.append(target - target.mean())
        return _grow(np.concatenate(features), np.concatenate(targets))


def _chosen(problem: Problem, picks: Ints) -> Floats:
    """One column for each choice ``[K, G * S]``."""
    return np.eye(problem.loss.shape[1])[picks].reshape(len(picks), -1)


def _shared(problem: Problem, picks: Ints, seeded: bool) -> tuple[Floats, Floats]:
    """Features that models share ``[K, F]``, and logarithms of the predicted losses ``[K]`` (or zeros).

    They are how large the choices are along the network, at most 1: evenly spaced, on average, at least, and on
    average over the predicted losses; and the predicted loss, compared with the largest there is.
    """
    G, S = problem.loss.shape
    groups = np.arange(G)
    cost = sum((c.cost.sum(2) for c in problem.constraints), np.zeros((G, S)))
    cost = cost if cost.any() else np.tile(np.arange(S, dtype=np.float64), (G, 1))
    most = np.where(problem.allowed, cost, 0.0).max(1)
    sizes = (cost / np.where(most > 0, most, 1.0)[:, None])[groups, picks]
    places = np.linspace(0, G - 1, _DEPTHS)
    profile = np.array([np.interp(places, groups, row) for row in sizes]).reshape(len(picks), _DEPTHS)
    columns = [profile, sizes.mean(1, keepdims=True), sizes.min(1, keepdims=True)]
    worst = np.where(problem.allowed, problem.loss, 0.0).max(1)
    if not seeded or worst.sum() <= 0:
        nothing = np.zeros(len(picks))
        return np.concatenate([*columns, np.full((len(picks), 2), np.nan)], 1), nothing
    base = np.log(predicted_shares(problem, picks)[1])
    weighted = sizes @ np.maximum(worst, 0.0) / np.maximum(worst, 0.0).sum()
    return np.column_stack([*columns, weighted, base - np.log(worst.sum())]), base


def _grow(features: Floats, targets: Floats) -> Booster:
    import xgboost

    settings = {**_SETTINGS, "base_score": float(targets.mean())}
    return xgboost.train(settings, xgboost.DMatrix(features, targets), _TREES)


def _predicted(trees: Booster, features: Floats) -> Floats:
    import xgboost

    found: Floats = trees.predict(xgboost.DMatrix(features)).astype(np.float64)
    return found
