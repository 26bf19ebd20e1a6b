"""Predictor of the loss of picks, conditioned on what their schemes are made of."""

from __future__ import annotations

import math
from numbers import Real

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.stats import kendalltau

from mpq.errors import MpqError
from mpq.problem import Floats, Ints, Problem
from mpq.search.logs import logarithms, predicted_shares
from mpq.search.residual import fit_scales
from mpq.search.surrogate import Attributes

# Medians and spreads (of the logarithm) of the priors of four scales, in natural logarithms of the loss: of the
# prediction's slope, of choices, of pairs of choices, and of what none of these explains.
_MEDIANS, _SPREADS = np.array([0.3, 1.0, 0.5, 0.05]), np.full(4, 1.0)
_OFFSET = 3.0  # scale of the common factor
_FITTED = 256  # losses from which the scales are fitted, at most
_FOLDS = 5
_JITTER = 1e-9


class LossPredictor:
    """Learns the logarithm of the loss of picks from choices and pairs of choices.

    Ridge regression in its dual form, a Gaussian process (Rasmussen and Williams, 2006, chapter 2): it learns from
    tens of losses, where the perceptron of EQ-Net's CQAP takes 8,000. Schemes that share an attribute share what is
    learnt of it.

    Args:
        problem: Whose picks are learnt.
        attributes: What each scheme is made of; by default only its mean cost.
        seeded: The predicted loss is what is corrected.

    Raises:
        MpqError: If attributes don't give one value for each scheme.
    """

    def __init__(self, problem: Problem, attributes: Attributes | None = None, *, seeded: bool = True) -> None:
        self._problem = problem
        self._codes = _codes({"cost": _mean_cost(problem)} if attributes is None else attributes, problem.loss.shape[1])
        self._seeded = seeded and bool(np.where(problem.allowed, problem.loss, 0.0).any())
        self._features = self._positions = self._solved = np.zeros(0)
        self._scales, self._reference = _MEDIANS, 0.0

    def learn(self, picks: Ints, losses: Floats) -> None:
        """Learn the losses ``[N]`` of picks ``[N, G]``."""
        self._learn(picks, logarithms(losses))

    def predict(self, picks: Ints) -> Floats:
        """Logarithm of the loss of picks ``[K, G]``."""
        features, base = self._terms(picks)
        positions = base - self._reference
        grams = _grams(features, positions, self._features, self._positions)
        mean: Floats = base + _covariance(grams, self._scales) @ self._solved
        return mean

    def held_out(self, picks: Ints, losses: Floats, rng: np.random.Generator) -> float:
        """Kendall's rank correlation of the losses ``[N]`` of picks ``[N, G]`` and what is predicted for them.

        Each fifth is predicted by what was learnt of the other four. NaN if there are fewer than ten.
        """
        if len(picks) < 2 * _FOLDS:
            return float("nan")
        logs, guesses = logarithms(losses), np.empty(len(losses))
        for fold in np.array_split(rng.permutation(len(picks)), _FOLDS):
            rest = np.setdiff1d(np.arange(len(picks)), fold)
            self._learn(picks[rest], logs[rest])
            guesses[fold] = self.predict(picks[fold])
        return float(kendalltau(guesses, logs).statistic)

    def _learn(self, picks: Ints, logs: Floats) -> None:
        self._features, base = self._terms(picks)
        self._reference = float(base.mean())
        self._positions = base - self._reference
        grams = _grams(self._features, self._positions, self._features, self._positions)
        some = slice(max(0, len(picks) - _FITTED), None)
        parts = [g[some, some] for g in grams]
        offset = np.full(parts[0].shape, _OFFSET**2)
        self._scales = fit_scales(offset, parts, (logs - base)[some], _MEDIANS, _SPREADS)
        covariance = _covariance(grams, self._scales)
        noise = (self._scales[-1] ** 2 + _JITTER) * np.eye(len(logs))
        self._solved = cho_solve(cho_factor(covariance + noise, lower=True), logs - base)

    def _terms(self, picks: Ints) -> tuple[Floats, Floats]:
        """Features ``[K, G * F]`` of unit length and logarithms of the predicted losses ``[K]`` (or zeros)."""
        features = self._codes[picks].reshape(len(picks), -1) / np.sqrt(picks.shape[1])
        base = np.log(predicted_shares(self._problem, picks)[1]) if self._seeded else np.zeros(len(picks))
        return features, base


def _codes(attributes: Attributes, schemes: int) -> Floats:
    """Codes ``[S, F]`` of unit length whose product says how much two schemes have in common.

    What tells a scheme from all others counts as one attribute.
    """
    columns = [np.eye(schemes)]
    for name, values in attributes.items():
        if len(values) != schemes:
            raise MpqError(f"attribute {name!r} has {len(values)} values for {schemes} schemes; give one for each")
        known = list(dict.fromkeys(values))
        if all(isinstance(v, Real) for v in known):
            columns.append(np.array([[1.0 if v >= k else -1.0 for k in sorted(known)] for v in values]))
        else:
            columns.append(np.array([[float(v == k) for k in known] for v in values]))
    codes = [c / np.linalg.norm(c, axis=1, keepdims=True) for c in columns]
    return np.concatenate(codes, 1) / math.sqrt(len(columns))


def _mean_cost(problem: Problem) -> list[float]:
    """Of each scheme ``[S]``, over groups and constraints, in shares of the limits."""
    shares = [(c.cost / np.maximum(np.abs(c.limit), 1e-300)).sum((0, 2)) for c in problem.constraints]
    return [float(x) for x in sum(shares, np.zeros(problem.loss.shape[1]))]


def _grams(features: Floats, positions: Floats, others: Floats, their: Floats) -> list[Floats]:
    """Covariances of slope, choices and pairs of choices, at scale 1."""
    same = features @ others.T
    return [np.outer(positions, their), same, same**2]


def _covariance(grams: list[Floats], scales: Floats) -> Floats:
    slope, *choices = (s**2 * g for s, g in zip(scales[:-1], grams, strict=True))
    found: Floats = _OFFSET**2 + slope + sum(choices)
    return found
