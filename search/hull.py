"""Convex hulls of all groups at once: the linear relaxation of the allocation problem.

For one additive cost, the schemes of a group that a linear relaxation ever mixes are the lower-right convex
hull of its (cost, loss) points. Sorting the hull edges of all groups by loss saved per cost gives every
optimum of the relaxation in one sweep (Sinha and Zoltners, 1979).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpq.problem import Floats, Ints


@dataclass(frozen=True, eq=False)
class HullSweep:
    """Hull edges of all groups, steepest first.

    Attributes:
        start: Cheapest scheme of each group (least loss among equals) ``[G]``.
        group: Group of each edge ``[E]``.
        scheme: Scheme that the edge moves its group to ``[E]``.
        added_cost: Cost that the move adds, positive ``[E]``.
        slope: Loss saved per cost, not increasing ``[E]``.
    """

    start: Ints
    group: Ints
    scheme: Ints
    added_cost: Floats
    slope: Floats

    def pick(self, moves: int) -> Ints:
        """The pick after the first ``moves`` edges ``[G]``."""
        pick = self.start.copy()
        pick[self.group[:moves]] = self.scheme[:moves]  # later edges of a group overwrite earlier ones
        return pick

    def picks(self) -> Iterator[Ints]:
        """All picks of the sweep, from the cheapest on."""
        pick = self.start.copy()
        yield pick.copy()
        for g, s in zip(self.group, self.scheme, strict=True):
            pick[g] = s
            yield pick.copy()


def hull_sweep(loss: Floats, cost: Floats) -> HullSweep:
    """Hull edges of every group by gift wrapping, vectorized over groups.

    Args:
        loss: ``[G, S]``, infinite where not allowed.
        cost: ``[G, S]``, finite.
    """
    G, S = loss.shape
    groups = np.arange(G)
    allowed = np.isfinite(loss)
    cheapest = np.where(allowed, cost, np.inf)
    at_cheapest = cheapest == cheapest.min(1, keepdims=True)
    start = np.where(at_cheapest, loss, np.inf).argmin(1)
    current, edges = start, []
    for _ in range(S - 1):
        added = cost - cost[groups, current][:, None]
        saved = loss[groups, current][:, None] - loss
        ahead = allowed & (added > 0) & (saved > 0)
        slope = np.where(ahead, saved, 0.0) / np.where(ahead, added, 1.0)
        steepest = slope.max(1, keepdims=True, initial=0.0)
        # Of points on one line take the nearest, so that the sweep visits all of them.
        target = np.where(ahead & (slope == steepest), added, np.inf).argmin(1)
        moving = np.flatnonzero(steepest[:, 0] > 0)
        if not len(moving):
            break
        to = target[moving]
        edges.append((moving, to, added[moving, to], slope[moving, to]))
        current = current.copy()
        current[moving] = to
    if not edges:
        none = np.zeros(0)
        return HullSweep(start, none.astype(np.int64), none.astype(np.int64), none, none)
    group, scheme, added_cost, slope = (np.concatenate(column) for column in zip(*edges, strict=True))
    order = np.argsort(-slope, kind="stable")
    return HullSweep(start, group[order], scheme[order], added_cost[order], slope[order])
