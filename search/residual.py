"""What a few measured losses say about the predicted ones: Bayesian regression of their ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

from mpq.problem import Floats, Ints, Problem

# Medians and spreads (of the logarithm) of the priors of four scales, in natural logarithms of the loss: the slope of
# measured against predicted logarithms, less one; a factor for each choice wherever it is taken; a factor for each
# choice's share of the loss; what none of these explains.
_MEDIANS, _SPREADS = np.array([0.1, 0.3, 0.5, 0.05]), np.array([1.0, 0.7, 0.7, 0.7])
_OFFSET = 3.0  # scale of the common factor: measured and predicted losses may have different units
_FEWEST = 3  # losses from which the scales are fitted
_LEAST_SHARE = 0.1  # a prediction that interactions all but cancel counts as this share of the groups' own losses
_JITTER = 1e-9


class ResidualModel:
    """Predicts the logarithm of the measured loss, with that of the predicted one as prior mean.

    The ratio of both is explained by a common factor, a power of the prediction, a factor for each choice and a factor
    for each choice's share of the predicted loss: a wrong sensitivity matters as far as it makes up the loss. All
    coefficients have normal priors, so this is a Gaussian process (Rasmussen and Williams, 2006, chapter 2); the scales
    of the priors are fitted as the mode of their posterior.

    Args:
        problem: Predicted losses.
        picks: Measured picks ``[N, G]``.
        losses: Their losses ``[N]``; infinite ones count as twice the largest finite one. Where some are not positive,
            a constant is added to all.

    Attributes:
        logs: Logarithms of the losses ``[N]``: the unit of what is predicted.
        scales: Fitted scales: slope, choices, shares and rest.
    """

    def __init__(self, problem: Problem, picks: Ints, losses: Floats) -> None:
        self._problem, self.logs = problem, logarithms(losses)
        self._own = np.where(problem.allowed, problem.loss, 0.0)
        self._reference = 0.0
        self._reference = float(self._terms(picks)[0].mean())
        prior, features = self._terms(picks)
        self._residual = self.logs - prior
        self.scales = self._fit(features)
        self._features = features * self._weights(self.scales)
        self._factor = cho_factor(_gram(self._features, self.scales[-1]), lower=True)
        self._solved: Floats = cho_solve(self._factor, self._residual)

    def predict(self, picks: Ints) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the logarithm of the loss of other picks ``[M, G]``, ``[M]`` each."""
        prior, features = self._terms(picks)
        features = features * self._weights(self.scales)
        cross = features @ self._features.T
        mean: Floats = prior + cross @ self._solved
        known = np.square(solve_triangular(self._factor[0], cross.T, lower=True)).sum(0)
        variance = np.square(features).sum(1) + self.scales[-1] ** 2 - known
        return mean, np.sqrt(np.maximum(variance, _JITTER))

    def gain(self, picks: Ints, best: float) -> Floats:
        """Expected improvement ``[M]`` over a best logarithm (Mockus, 1975): about the expected relative gain."""
        mean, deviation = self.predict(picks)
        z = (best - mean) / deviation
        density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
        gain: Floats = deviation * (z * ndtr(z) + density)
        return gain

    def corrected(self, rng: np.random.Generator | None = None) -> Problem:
        """The problem with its losses and interactions corrected by what was measured.

        Args:
            rng: Draw the corrections from their posterior (Thompson, 1933) in place of its mean.
        """
        G, S = self._own.shape
        weights = self._features.T @ self._solved
        if rng is not None:
            # A draw from the prior, moved by what the measured residuals say about it (Matheron's rule).
            drawn = rng.standard_normal(self._features.shape[1])
            noise = self.scales[-1] * rng.standard_normal(len(self.logs))
            error = self._features @ drawn + noise
            weights = weights + drawn - self._features.T @ cho_solve(self._factor, error)
        scaled = weights * self._weights(self.scales)
        everywhere, share = scaled[2 : 2 + G * S].reshape(G, S), scaled[2 + G * S :].reshape(G, S)
        # One choice wherever it is taken: a share of a whole loss, that of a pick as good as those measured.
        loss = self._own * np.exp(share) + np.exp(self._reference) * (everywhere - everywhere.min(1, keepdims=True))
        pairs = self._problem.interactions
        if pairs is not None:
            root = np.exp(0.5 * share)
            pairs = pairs * (root[:, :, None, None] * root)
        return Problem(np.where(self._problem.allowed, loss, np.inf), self._problem.constraints, pairs)

    def _terms(self, picks: Ints) -> tuple[Floats, Floats]:
        """Logarithms of the predictions ``[M]`` and unscaled features ``[M, 2 + 2 * G * S]``."""
        G, S = self._own.shape
        shares, total = predicted_shares(self._problem, picks)
        prior = np.log(total)
        chosen = np.eye(S)[picks]
        taken = chosen.reshape(len(picks), -1) / np.sqrt(G)
        shared = (chosen * shares[..., None]).reshape(len(picks), -1)
        common = np.stack([np.ones(len(picks)), prior - self._reference], 1)
        return prior, np.concatenate([common, taken, shared], 1)

    def _weights(self, scales: Floats) -> Floats:
        """Scale of each feature."""
        size = self._own.size
        return np.concatenate([[_OFFSET, scales[0]], np.full(size, scales[1]), np.full(size, scales[2])])

    def _fit(self, features: Floats) -> Floats:
        """Mode of the posterior of the scales."""
        if len(features) < _FEWEST:
            return _MEDIANS
        size = self._own.size
        parts = [features[:, :1], features[:, 1:2], features[:, 2 : 2 + size], features[:, 2 + size :]]
        offset, *grams = (part @ part.T for part in parts)
        return fit_scales(_OFFSET**2 * offset, grams, self._residual, _MEDIANS, _SPREADS)


def fit_scales(known: Floats, grams: Sequence[Floats], target: Floats, medians: Floats, spreads: Floats) -> Floats:
    """Scales ``[len(grams) + 1]`` of the parts of a Gaussian process and of its noise: the mode of their posterior.

    Args:
        known: Covariance whose scale is known ``[N, N]``.
        grams: Covariance of each part at scale 1 ``[N, N]``.
        target: What is explained ``[N]``.
        medians: Of the log-normal priors of the scales.
        spreads: Their standard deviations in natural logarithms.
    """

    def cost(logs: Floats) -> float:
        *squares, rest = np.exp(2 * logs)
        gram = known + sum(s * g for s, g in zip(squares, grams, strict=True))
        factor = np.linalg.cholesky(gram + (rest + _JITTER) * np.eye(len(gram)))
        fit = solve_triangular(factor, target, lower=True)
        prior = np.square((logs - np.log(medians)) / spreads).sum()
        return float(0.5 * fit @ fit + np.log(np.diag(factor)).sum() + 0.5 * prior)

    found: Floats = minimize(cost, np.log(medians), method="L-BFGS-B", bounds=[(-7.0, 3.0)] * len(medians)).x
    return np.exp(found)


def _gram(features: Floats, rest: float) -> Floats:
    gram: Floats = features @ features.T + (rest**2 + _JITTER) * np.eye(len(features))
    return gram


def predicted_shares(problem: Problem, picks: Ints) -> tuple[Floats, Floats]:
    """Each group's share ``[K, G]`` of the predicted loss of picks ``[K, G]``, and that loss ``[K]``, kept positive."""
    groups = np.arange(len(problem.loss))
    losses = np.where(problem.allowed, problem.loss, 0.0)
    own = losses[groups, picks]
    shares = own.copy()
    if problem.interactions is not None:
        for share, pick in zip(shares, picks, strict=True):
            share += 0.5 * problem.interactions[groups[:, None], pick[:, None], groups, pick].sum(1)
    floor = 1e-12 * float(np.abs(losses).sum()) + 1e-300
    total = np.maximum(shares.sum(1), _LEAST_SHARE * np.abs(own).sum(1) + floor)
    return shares / total[:, None], total


def logarithms(losses: Floats) -> Floats:
    """Logarithms of losses ``[N]``.

    Infinite ones count as twice the largest finite one; where some are not positive, a constant is added to all.
    """
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return np.zeros(len(losses))
    low, high = float(finite.min()), float(finite.max())
    # Losses such as a drop of accuracy may be zero or less: their differences count, those below the shift little.
    shift = 0.0 if low > 0 else 0.05 * (high - low) - low + 1e-12
    capped = np.where(np.isfinite(losses), losses, high + abs(high) + shift)
    logs: Floats = np.log(capped + shift)
    return logs
