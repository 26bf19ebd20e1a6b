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

_SMALL = 20_000  # groups that are swept as a whole
_SAMPLE = 4000  # groups that give the first guess of the price of a larger problem
_LATER = 1000  # edges beyond the limit that are tried to use the room left


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


def linear_optimum(loss: Floats, cost: Floats, limit: float) -> tuple[float, Ints]:
    """Price of the limit in the linear relaxation, and its optimum rounded to a pick: all hull moves that fit.

    Of many groups only those are swept whose best scheme changes between two prices around the answer: what is best at
    both prices is best between them.

    Args:
        loss: ``[G, S]``, infinite where not allowed.
        cost: ``[G, S]``, finite.
        limit: Of the sum of costs; at least that of the cheapest schemes.
    """
    G = len(loss)
    best = loss.argmin(1)
    if cost[np.arange(G), best].sum() <= limit:
        return 0.0, best
    bracket = _bracket(loss, cost, limit) if G > _SMALL else None
    if bracket is None:
        return _fill(hull_sweep(loss, cost), cost, limit)
    dear, cheap = bracket
    moving = np.flatnonzero(dear != cheap)
    fixed = np.ones(G, bool)
    fixed[moving] = False
    spent = float(cost[np.flatnonzero(fixed), dear[fixed]].sum())
    price, found = _fill(hull_sweep(loss[moving], cost[moving]), cost[moving], limit - spent)
    dear[moving] = found
    return price, dear


def _bracket(loss: Floats, cost: Floats, limit: float) -> tuple[Ints, Ints] | None:
    """Best picks at two prices, of which the first exceeds the limit and the second does not; None if not found."""
    groups = np.arange(len(loss))

    def priced(price: float) -> tuple[Ints, bool]:
        pick = (cost * price + loss).argmin(1)
        return pick, bool(cost[groups, pick].sum() > limit)

    part = np.arange(0, len(loss), -(-len(loss) // _SAMPLE))
    masked = np.where(np.isfinite(loss), cost, np.inf)
    least, most = masked.min(1), np.where(np.isfinite(loss), cost, -np.inf).max(1)
    share = (limit - least.sum()) / max(float((most - least).sum()), 1e-300)
    guess, _ = _fill(
        hull_sweep(loss[part], cost[part]), cost[part], float((least + share * (most - least))[part].sum())
    )
    low, high = guess / 1.02, guess * 1.02
    dear, too_dear = priced(low)
    cheap, still_too_dear = priced(high)
    for _ in range(20):
        if too_dear and not still_too_dear:
            return dear, cheap
        if not too_dear:
            low /= 2
            dear, too_dear = priced(low)
        if still_too_dear:
            high *= 2
            cheap, still_too_dear = priced(high)
    return None


def _fill(sweep: HullSweep, cost: Floats, limit: float) -> tuple[float, Ints]:
    """Price where the limit cuts the sweep, and the pick of all moves that fit, steepest first."""
    spent = float(cost[np.arange(len(cost)), sweep.start].sum())
    total = spent + np.cumsum(sweep.added_cost)
    cut = int(np.searchsorted(total, limit, side="right"))
    price = float(sweep.slope[cut]) if cut < len(sweep.slope) else 0.0
    pick = sweep.pick(cut)
    spent = float(total[cut - 1]) if cut else spent
    stuck = set()  # a group whose next move did not fit can't skip it along the hull
    for e in range(cut, min(len(sweep.slope), cut + _LATER)):
        g = int(sweep.group[e])
        if spent + sweep.added_cost[e] > limit:
            stuck.add(g)
        elif g not in stuck:
            pick[g] = sweep.scheme[e]
            spent += float(sweep.added_cost[e])
    return price, pick
