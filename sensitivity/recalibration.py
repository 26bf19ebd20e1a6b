"""Fit a predicted loss to measured configs: large entries are corrected, and losses saturate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpq.problem import Floats, Ints

# Standard deviations of the prior, in the logarithm of a loss; found on ResNet-20, MobileNetV2 and an exhaustive table
# (benchmarks/sensitivity_quality.py). Second order is right for small errors, far below the ceiling; large ones may be
# off by e^0.5 each, and all of them together in the same direction.
_COMMON, _SPREAD, _SHARED, _FIRM = 0.3, 0.5, 0.5, 1e-3
_LARGE, _SHARED_LARGE = 0.01, 0.003  # ceilings: what counts as a large error
_NOISE = 0.1  # of a measured loss against a perfect prediction


@dataclass(frozen=True)
class Recalibration:
    """What measured configs say about a predicted loss.

    Attributes:
        correction: Each entry's loss is multiplied by its exponential ``[G, S]``.
        coupling: Interactions are multiplied by it, 0..1.
        ceiling: Loss that the prediction can't exceed.
        error: Root mean square of ``log(predicted / measured)`` after the fit.
    """

    correction: Floats
    coupling: float
    ceiling: float
    error: float


class Recalibrator:
    """Maximum a posteriori fit with normal priors, in the logarithm of the loss.

    ``predicted = v / (1 + v / ceiling)`` with ``v = sum_g a_g^2 loss_g + coupling sum_{g<h} a_g a_h interactions_gh``
    at the picked schemes and ``a = exp(correction / 2)``. A correction is the sum of one that all entries have in
    common and of those which only large entries have: of its own, and of what its scheme shares with others of the same
    group, such as the activation format.

    Args:
        loss: ``[G, S]``, on the samples that are measured.
        interactions: ``[G, S, G, S]``, on the same samples.
        ceiling: Where predictions are expected to saturate, within a factor of about e.
        shared: For each feature that schemes share, its number for every scheme ``[S]``.
    """

    def __init__(
        self, loss: Floats, interactions: Floats, ceiling: float, shared: Sequence[Sequence[int]] = ()
    ) -> None:
        G, S = loss.shape
        self._shape, self._ceiling = (G, S), ceiling
        self._loss = torch.from_numpy(loss.reshape(-1))
        self._pairs = torch.from_numpy(interactions.reshape(G * S, G * S))
        self._spread = _FIRM + _SPREAD * self._loss / (self._loss + _LARGE * ceiling)
        self._shared_spread = _SHARED * self._loss / (self._loss + _SHARED_LARGE * ceiling)
        # Which parameters, besides its own, make up the correction of each entry.
        groups, size = np.arange(G)[:, None], G * S
        self._shared: list[Tensor] = []
        for feature in shared:
            numbers = np.unique(feature, return_inverse=True)[1]
            kinds = int(numbers.max()) + 1
            self._shared.append(torch.from_numpy((size + groups * kinds + numbers).reshape(-1)))
            size += G * kinds
        self._count = size + 3

    def informative(self, candidates: Ints, count: int) -> Ints:
        """Indices of the candidates ``[C, G]`` whose measured losses would say most about those of all others.

        Greedy: each next one lowers the sum of the posterior variances of all predictions most, which are linear in the
        parameters to first order (A-optimal design; Chaloner and Verdinelli, 1995).
        """
        start = torch.zeros(self._count, dtype=torch.float64)
        jacobian = torch.autograd.functional.jacobian(  # type: ignore[no-untyped-call]
            lambda p: self._log_predicted(p, candidates), start, vectorize=True
        )
        covariance = (jacobian @ jacobian.T).numpy()
        chosen: list[int] = []
        for _ in range(min(count, len(candidates))):
            gain = np.square(covariance).sum(0) / (covariance.diagonal() + _NOISE**2)
            gain[chosen] = -np.inf
            best = int(gain.argmax())
            chosen.append(best)
            column = covariance[:, best].copy()
            covariance -= np.outer(column, column) / (column[best] + _NOISE**2)
        return np.array(chosen, np.int64)

    def fit(self, picks: Ints, measured: Floats) -> Recalibration:
        """The corrections for measured configs ``[K, G]`` and their losses ``[K]``, positive."""
        target = torch.from_numpy(measured).log()
        parameters = torch.zeros(self._count, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([parameters], max_iter=300, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            misfit = (self._log_predicted(parameters, picks) - target).square().sum() / _NOISE**2
            value: Tensor = misfit + parameters.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(objective)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            residuals = self._log_predicted(parameters, picks) - target
            coupling, ceiling = self._coupling_and_ceiling(parameters)
            correction = self._correction(parameters).reshape(self._shape).numpy()
        return Recalibration(correction, float(coupling), float(ceiling), float(residuals.square().mean().sqrt()))

    def _correction(self, parameters: Tensor) -> Tensor:
        correction = parameters[: self._loss.numel()] * self._spread + _COMMON * parameters[-3]
        for index in self._shared:
            correction = correction + parameters[index] * self._shared_spread
        return correction

    def _coupling_and_ceiling(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The coupling is near 0.9 where the measured configs say nothing."""
        return torch.sigmoid(parameters[-2] + 2), self._ceiling * parameters[-1].exp()

    def _log_predicted(self, parameters: Tensor, picks: Ints) -> Tensor:
        G, S = self._shape
        index = torch.from_numpy(picks + np.arange(G) * S)
        a = (0.5 * self._correction(parameters)).exp()[index]
        coupling, ceiling = self._coupling_and_ceiling(parameters)
        pairs = self._pairs[index[:, :, None], index[:, None, :]]
        v = (a.square() * self._loss[index]).sum(1) + coupling * 0.5 * torch.einsum("kg,kgh,kh->k", a, pairs, a)
        v = v.clamp_min(1e-12 * self._ceiling)
        return v.log() - torch.log1p(v / ceiling)
