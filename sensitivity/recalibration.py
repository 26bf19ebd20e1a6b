"""Fit a predicted loss to a few measured configs: large entries are corrected, and losses saturate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpq.problem import Floats, Ints

# Prior of the corrections, found on ResNet-20, MobileNetV2 and an exhaustive table (benchmarks/sensitivity_quality.py):
# an entry far below the ceiling is a small error, which second order predicts well; a large one may be off by e^0.5.
_SPREAD, _LARGE, _FIRM = 0.5, 0.01, 1e-3
_NOISE = 0.1  # of a measured loss against a perfect prediction, relative


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


def recalibrate(loss: Floats, interactions: Floats, picks: Ints, measured: Floats, ceiling: float) -> Recalibration:
    """Fit corrections by maximum a posteriori with normal priors, in the logarithm of the loss.

    ``predicted = v / (1 + v / ceiling)`` with ``v = sum_g a_g^2 loss_g + coupling sum_{g<h} a_g a_h interactions_gh``
    at the picked schemes and ``a = exp(correction / 2)``.

    Args:
        loss: ``[G, S]``, on the samples that were measured.
        interactions: ``[G, S, G, S]``, on the same samples.
        picks: Measured configs ``[K, G]``.
        measured: Their losses ``[K]``, positive.
        ceiling: Where predictions are expected to saturate, within a factor of about e.
    """
    G, S = loss.shape
    flat, pairs = torch.from_numpy(loss.reshape(-1)), torch.from_numpy(interactions.reshape(G * S, G * S))
    index = torch.from_numpy(picks + np.arange(G) * S)
    chosen, coupled = flat[index], pairs[index[:, :, None], index[:, None, :]]
    target = torch.from_numpy(measured).log()
    spread = _SPREAD * flat / (flat + _LARGE * ceiling) + _FIRM
    unit = torch.zeros(G * S, dtype=torch.float64, requires_grad=True)  # correction in units of its prior
    couple = torch.zeros((), dtype=torch.float64, requires_grad=True)
    top = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def residuals() -> Tensor:
        a = (0.5 * unit * spread).exp()[index]
        v = (a.square() * chosen).sum(1) + _coupling(couple) * 0.5 * torch.einsum("kg,kgh,kh->k", a, coupled, a)
        v = v.clamp_min(1e-12 * ceiling)
        return v.log() - torch.log1p(v / (ceiling * top.exp())) - target

    optimizer = torch.optim.LBFGS([unit, couple, top], max_iter=300, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        prior = unit.square().sum() + couple.square() + top.square()
        value: Tensor = residuals().square().sum() / _NOISE**2 + prior
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        error = float(residuals().square().mean().sqrt())
        correction = (unit * spread).reshape(G, S).numpy()
        return Recalibration(correction, float(_coupling(couple)), ceiling * float(top.exp()), error)


def _coupling(x: Tensor) -> Tensor:
    """0..1, near 0.9 where the measured configs say nothing."""
    return torch.sigmoid(x + 2)
