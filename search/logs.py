"""Predicted and measured losses as models learn them: positive, and as logarithms."""

from __future__ import annotations

import numpy as np

from mpq.problem import Floats, Ints, Problem

_LEAST_SHARE = 0.1  # a prediction that interactions all but cancel counts as this share of the groups' own losses


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
