"""Repair: from the pick of a relaxation to a feasible one, and on to one that uses the room left."""

from __future__ import annotations

import time

import numpy as np

from mpq.problem import Floats, Ints

_TINY = 1e-30  # keeps ratios of scaled numbers finite
_STEPS = 500  # of a greedy repair: each moves as many groups as it can
_SWAPS, _SWAPPED = 400, 240  # paired changes tried at most, and the choices that each is chosen from
_IDLE, _KICK = 3, 7  # tries without success until groups are changed at random, and how many


class Repair:
    """Moves single groups, many at a time where groups are many; where that ends above a limit, two at once.

    Args:
        loss: ``[G, S]``, infinite where not allowed.
        cost: ``[G, S, R]``.
        limit: ``[R]``, finite.
        reduced: What each choice adds to the bound of the relaxation ``[G, S]``.
        prices: Loss per unit of each row ``[R]``.
        deadline: Value of ``time.perf_counter()`` at which it stops.
    """

    def __init__(
        self, loss: Floats, cost: Floats, limit: Floats, reduced: Floats, prices: Floats, deadline: float
    ) -> None:
        allowed = np.isfinite(loss)
        worth = float(np.abs(loss[allowed]).max()) or 1.0
        unit = np.abs(cost).max((0, 1))
        unit[unit == 0] = 1.0
        self._loss, self._allowed = loss / worth, allowed
        self._cost, self._limit = cost / unit, limit / unit
        self._reduced, self._toll = reduced / worth, cost @ prices / worth
        self._deadline, self._groups = deadline, np.arange(len(loss))

    def best(self) -> Ints | None:
        """The least total loss of the feasible picks found, or None; the first is looked for beyond the deadline."""
        found: list[Ints] = []
        stuck: list[Ints] = []
        for pick in self._starts():
            moved = self._lowered(pick)
            if self._excess(moved) > 0:
                stuck.append(moved)
                continue
            found.append(self._fill(moved))
            if time.perf_counter() > self._deadline:
                break
        if not found:
            swapped = self._swapped(min(stuck, key=self._excess))
            return swapped if swapped is None else self._fill(swapped)
        return min(found, key=lambda p: float(self._loss[self._groups, p].sum()))

    def _starts(self) -> list[Ints]:
        """The relaxation's pick; those of higher prices, which use less; and the one that uses least."""
        share = self._cost / np.maximum(np.abs(self._limit), 1.0)
        least = np.where(self._allowed, share.sum(2), np.inf)
        higher = [(self._reduced + more * self._toll).argmin(1) for more in (0.02, 0.3)]
        return [self._reduced.argmin(1), *higher, least.argmin(1)]

    def _lowered(self, pick: Ints) -> Ints:
        """Make the cheapest moves by reduced cost per violation that they end, until none is left or none helps."""
        pick = pick.copy()
        g = self._groups
        for _ in range(_STEPS):
            over = self._cost[g, pick].sum(0) - self._limit
            if (over <= 0).all():
                break
            added = self._cost - self._cost[g, pick][:, None]
            before = np.maximum(over, 0.0)
            ended = (before - np.maximum(over + added, 0.0)).sum(2)
            ended[~self._allowed] = 0.0
            price = np.maximum(np.where(self._allowed, self._reduced, 0.0) - self._reduced[g, pick][:, None], _TINY)
            rate = np.where(ended > 1e-15 * before.max(), ended, 0.0) / price
            move = rate.argmax(1)
            order = np.argsort(-rate[g, move], kind="stable")
            order = order[rate[order, move[order]] > 0]
            if not len(order):
                break
            # As many as stay short of what is needed, at least one: later moves are looked at anew.
            total = over + np.cumsum(added[order, move[order]], 0)
            still = (total > 0).any(1) & (np.maximum(total, 0) <= before + 1e-12).all(1)
            count = max(1, int(still.argmin()) if not still.all() else len(order))
            pick[order[:count]] = move[order[:count]]
        return pick

    def _excess(self, pick: Ints) -> float:
        """How far the rows are above their limits, in units of their largest cost and summed."""
        return float(np.maximum(self._cost[self._groups, pick].sum(0) - self._limit, 0.0).sum())

    def _swapped(self, pick: Ints) -> Ints | None:
        """Change the two of some groups that end most violation, whatever the loss, until no limit is violated.

        Sums of two changes are far more finely spaced than single ones: they meet limits of conflicting rows that
        leave no room. None if too many tries fail.
        """
        G, S = self._loss.shape
        rng, idle = np.random.default_rng(0), 0
        for _ in range(_SWAPS):
            if not self._excess(pick):
                return pick
            if idle == _IDLE or (idle and G * S <= _SWAPPED):
                pick, idle = self._kicked(pick, rng), 0
            part = np.sort(rng.permutation(G)[: max(2, _SWAPPED // S)])
            g, s = np.nonzero(self._allowed[part])
            g = part[g]
            added = self._cost[g, s] - self._cost[g, pick[g]]
            over = self._cost[self._groups, pick].sum(0) - self._limit
            left = np.maximum(over + added[:, None] + added, 0.0).sum(2)
            left[g[:, None] == g] = np.inf
            np.fill_diagonal(left, np.maximum(over + added, 0.0).sum(1))
            first, second = np.unravel_index(left.argmin(), left.shape)
            if left[first, second] < self._excess(pick) * (1 - 1e-9):
                pick = pick.copy()
                pick[g[[first, second]]] = s[[first, second]]
                idle = 0
            else:
                idle += 1
        return None

    def _kicked(self, pick: Ints, rng: np.random.Generator) -> Ints:
        found = pick.copy()
        for g in rng.permutation(len(pick))[:_KICK]:
            found[g] = rng.choice(np.flatnonzero(self._allowed[g]))
        return found

    def _fill(self, pick: Ints) -> Ints:
        """Make the moves that save most loss for the room that they take."""
        pick = pick.copy()
        g = self._groups
        while time.perf_counter() < self._deadline:
            room = self._limit - self._cost[g, pick].sum(0)
            added = self._cost - self._cost[g, pick][:, None]
            saved = self._loss[g, pick][:, None] - self._loss
            fits = self._allowed & (saved > 0) & (added <= room).all(2)
            taken = (np.maximum(added, 0) / np.maximum(room, _TINY)).sum(2) + _TINY
            rate = np.where(fits, saved, 0.0) / taken
            move = rate.argmax(1)
            order = np.argsort(-rate[g, move], kind="stable")
            order = order[rate[order, move[order]] > 0]
            if not len(order):
                break
            fitting = (np.cumsum(added[order, move[order]], 0) <= room).all(1)
            count = max(1, int(fitting.argmin()) if not fitting.all() else len(order))
            pick[order[:count]] = move[order[:count]]
        return pick
