"""Frontiers of loss against one additive cost: the convex one in a sweep, the exact one by dynamic programming."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq.problem import Floats, Ints
from mpq.search.hull import hull_sweep


@dataclass(frozen=True, eq=False)
class FrontierPicks:
    """Picks that no other dominates, by rising cost.

    Attributes:
        picks: ``[P, G]``.
        cost: ``[P]``, rising.
        loss: ``[P]``, falling.
        exact: True if these are all such picks, False if only those on the convex hull.
    """

    picks: Ints
    cost: Floats
    loss: Floats
    exact: bool


def convex_frontier(loss: Floats, cost: Floats, max_points: int = 20_000) -> FrontierPicks:
    """Every pick that is optimal for some price of the cost, in one sweep over the hull edges.

    Args:
        loss: ``[G, S]``, infinite where not allowed.
        cost: ``[G, S]``, finite.
        max_points: Of more picks keep about this many, evenly along the cost; fewer with over 1,000 groups (memory).
    """
    sweep = hull_sweep(loss, cost)
    spent = np.concatenate([[0.0], np.cumsum(sweep.added_cost)])
    most = max(2, min(max_points, 20_000_000 // max(1, len(loss))))
    if len(spent) <= most:
        picks = np.array(list(sweep.picks()))
    else:
        along = np.searchsorted(spent, np.linspace(0, spent[-1], most))
        moves = np.unique(np.minimum(along, len(spent) - 1))
        picks = np.array([sweep.pick(m) for m in moves.tolist()])
    groups = np.arange(len(loss))
    return FrontierPicks(picks, cost[groups, picks].sum(1), loss[groups, picks].sum(1), exact=False)


def extend_frontier(
    costs: Floats,
    losses: Floats,
    more_cost: Floats,
    more_loss: Floats,
    within: tuple[float, float] = (-np.inf, np.inf),
    regrets: tuple[Floats, Floats, float] | None = None,
) -> tuple[Floats, Floats, Floats, Ints, Ints]:
    """One step of the dynamic program: join each state with each scheme of the next group and prune.

    Args:
        costs: Costs of the states ``[N]``.
        losses: Losses of the states ``[N]``.
        more_cost: Costs of the group's schemes ``[K]``.
        more_loss: Losses of the group's schemes ``[K]``.
        within: States whose cost is not in this range are dropped.
        regrets: Reduced costs of the states ``[N]`` and schemes ``[K]``, and the largest sum that is kept.

    Returns:
        Costs (rising), losses (falling) and regrets of the new states, the parent state and the scheme of each.
    """
    cost = (costs[:, None] + more_cost).ravel()
    loss = (losses[:, None] + more_loss).ravel()
    fits = (within[0] <= cost) & (cost <= within[1])
    regret = np.zeros_like(cost)
    if regrets is not None:
        state_regret, scheme_regret, gap = regrets
        regret = (state_regret[:, None] + scheme_regret).ravel()
        fits &= regret <= gap
    index = np.flatnonzero(fits)
    index = index[np.lexsort((loss[index], cost[index]))]
    ordered = loss[index]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], ordered]))[:-1]
    index = index[ordered < best_before]
    parent, choice = np.divmod(index, len(more_cost))
    return cost[index], loss[index], regret[index], parent, choice


def exact_frontier(loss: Floats, cost: Floats, max_states: int | None = None) -> FrontierPicks | None:
    """All picks that no other dominates, by dominance-pruned dynamic programming.

    Args:
        loss: ``[G, S]``, infinite where not allowed.
        cost: ``[G, S]``, finite.
        max_states: Give up above this many states; by default 200,000, fewer with over 100 groups (memory).

    Returns:
        The frontier, or None if it has too many states.
    """
    if max_states is None:
        max_states = min(200_000, 20_000_000 // max(1, len(loss)))
    costs, losses = np.zeros(1), np.zeros(1)
    history: list[tuple[Ints, Ints]] = []
    for g in range(len(loss)):
        schemes = np.flatnonzero(np.isfinite(loss[g]))
        costs, losses, _, parent, choice = extend_frontier(costs, losses, cost[g, schemes], loss[g, schemes])
        if len(costs) > max_states:
            return None
        history.append((parent, schemes[choice]))
    picks = np.empty((len(costs), len(loss)), np.int64)
    state = np.arange(len(costs))
    for g in range(len(loss) - 1, -1, -1):
        parent, scheme = history[g]
        picks[:, g], state = scheme[state], parent[state]
    return FrontierPicks(picks, costs, losses, exact=True)


def undominated(points: Floats) -> Ints:
    """Which points ``[N, D]`` no other dominates, smaller being better; of equal ones the first. Sorted by column."""
    order = np.lexsort(points.T[::-1])
    kept: list[int] = []
    if points.shape[1] == 2:
        least = np.inf
        for i in order:
            if points[i, 1] < least:
                kept.append(int(i))
                least = points[i, 1]
        return np.array(kept, np.int64)
    for i in order:  # a later point dominates no earlier one
        if not kept or not (points[kept] <= points[i]).all(1).any():
            kept.append(int(i))
    return np.array(kept, np.int64)
