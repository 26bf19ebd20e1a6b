"""What a few measured losses say about the predicted ones: Bayesian regression of their ratio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

from mpq.problem import Floats, Ints, Problem
from mpq.search.logs import logarithms, predicted_shares

# Medians and spreads (of the logarithm) of the priors of five scales, in natural logarithms of the loss: the slope of
# measured against predicted logarithms, less one; the strength of the interactions, less one; a factor for each choice
# wherever it is taken; a factor for each choice's share of the loss; what none of these explains. The last three are
# held tight: a few losses that happen to agree must not make the model sure of itself.
_MEDIANS, _SPREADS = np.array([0.1, 0.2, 0.3, 0.5, 0.05]), np.array([1.0, 1.0, 0.4, 0.4, 0.5])
_COMMON = 3  # features that belong to no choice: the common factor, the slope and the interactions
_OFFSET = 3.0  # scale of the common factor: measured and predicted losses may have different units
_FEWEST = 3  # losses from which the scales are fitted
_JITTER = 1e-9


class ResidualModel:
    """Predicts the logarithm of the measured loss, with that of the predicted one as prior mean.

    The ratio of both is explained by a common factor, a power of the prediction, the strength of all interactions, a
    factor for each choice and a factor for each choice's share of the predicted loss: a wrong sensitivity matters as
    far as it makes up the loss. All coefficients have normal priors, so this is a Gaussian process (Rasmussen and
    Williams, 2006, chapter 2); the scales of the priors are fitted as the mode of their posterior.

    Args:
        problem: Predicted losses.
        picks: Measured picks ``[N, G]``.
        losses: Their losses ``[N]``; infinite ones count as twice the largest finite one. Where some are not positive,
            a constant is added to all.

    Attributes:
        logs: Logarithms of the losses ``[N]``: the unit of what is predicted.
        scales: Fitted scales: slope, interactions, choices, shares and rest.
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
        everywhere, share = scaled[_COMMON:].reshape(2, G, S)
        # One choice wherever it is taken: a share of a whole loss, that of a pick as good as those measured.
        loss = self._own * np.exp(share) + np.exp(self._reference) * (everywhere - everywhere.min(1, keepdims=True))
        pairs = self._problem.interactions
        if pairs is not None:
            root = np.exp(0.5 * share)
            strength = np.clip(1 + scaled[2], 0.0, 2.0)
            pairs = pairs * (strength * root[:, :, None, None] * root)
        return Problem(np.where(self._problem.allowed, loss, np.inf), self._problem.constraints, pairs)

    def _terms(self, picks: Ints) -> tuple[Floats, Floats]:
        """Logarithms of the predictions ``[M]`` and unscaled features ``[M, 3 + 2 * G * S]``."""
        G, S = self._own.shape
        shares, total = predicted_shares(self._problem, picks)
        prior = np.log(total)
        chosen = np.eye(S)[picks]
        taken = chosen.reshape(len(picks), -1) / np.sqrt(G)
        shared = (chosen * shares[..., None]).reshape(len(picks), -1)
        paired = shares.sum(1) - self._own[np.arange(G), picks].sum(1) / total
        common = np.stack([np.ones(len(picks)), prior - self._reference, paired], 1)
        return prior, np.concatenate([common, taken, shared], 1)

    def _weights(self, scales: Floats) -> Floats:
        """Scale of each feature."""
        size = self._own.size
        return np.concatenate([[_OFFSET, *scales[:2]], np.full(size, scales[2]), np.full(size, scales[3])])

    def _fit(self, features: Floats) -> Floats:
        """Mode of the posterior of the scales."""
        if len(features) < _FEWEST:
            return _MEDIANS
        size = self._own.size
        ends = np.cumsum([1, 1, 1, size])
        offset, *grams = (part @ part.T for part in np.split(features, ends, axis=1))
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
