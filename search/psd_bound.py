"""Lower bounds of quadratic multiple-choice problems by semidefinite relaxation.

With x the 0/1 vector of choices, the objective is linear in the matrix Y = [1 x; x xx'] of all products. Y is positive
semidefinite, its entries are not negative, two schemes of one group exclude each other, and each product of a choice
with the slack of a limit is not negative either (reformulation-linearization, Sherali and Adams, 1990). Dropping only
that Y has rank one leaves a convex problem whose value is a lower bound. It holds linear relaxations of the products
within it, and is far above them when interactions come from a Gram matrix, as those of quantization errors do.

It is solved by operator splitting between the cone and the polyhedron, both written in the face of the cone where each
group's choices sum to one (Oliveira, Wolkowicz and Xu, 2018). Any matrix of multipliers gives a valid bound, converged
or not: what is left of the objective after the part that the cone accounts for is minimized over the polyhedron,
group by group.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from mpq.problem import Floats
from mpq.search.hull import hull_sweep

# Entries of Y are scaled by the root of the loss of their choice, so that large losses of choices that are hardly taken
# don't slow down the rest. These values converge fastest on tables of real networks and on random Gram matrices.
_SCALE, _SMALL_LOSS = 1.5, 0.1
_STEP, _RELAX = 0.2, 1.7


class PsdBound:
    """The relaxation of one problem, restricted to some schemes per group, with the state of its iteration.

    Args:
        loss: ``[G, S]``, scaled so that the best known objective is about 1.
        interactions: ``[G, S, G, S]``, scaled likewise.
        cost: ``[G, S, R]``; may have no rows.
        limit: ``[R]``, finite.
        keep: ``[G, S]``: schemes that may be picked; at least one per group.
    """

    def __init__(
        self, loss: Floats, interactions: Floats, cost: Floats, limit: Floats, keep: NDArray[np.bool_]
    ) -> None:
        self._problem = loss, interactions, cost, limit
        self.keep = keep
        g, s = np.nonzero(keep)
        self._group, n, R = g, len(g), len(limit)
        self._first = np.searchsorted(g, np.arange(len(keep)))
        self._loss, self._cost = loss[g, s], cost[g, s]
        # Unit of the slacks: of all choices, not only those kept, as it must stay when some are dropped.
        unit = np.maximum(limit - cost.min(1).sum(0), 1e-6 * np.maximum(np.abs(cost).max((0, 1)), np.abs(limit)))
        unit[unit == 0] = 1.0
        # Rows: one, choices, slacks; the slacks follow from the others.
        self._lift = np.vstack([np.eye(n + 1), np.c_[limit, -self._cost.T] / unit[:, None]])
        root = np.sqrt(np.maximum(self._loss, _SMALL_LOSS)) * _SCALE
        self._root = np.concatenate([[1.0], root, np.ones(R)])
        choices = np.arange(1, n + 1)
        others = np.setdiff1d(np.arange(n), self._first)
        face = np.zeros((n + 1, 1 + len(others)))
        face[0, 0] = face[1 + self._first, 0] = 1.0
        face[1 + others, 1 + np.arange(len(others))] = 1.0
        face[1 + self._first[g[others]], 1 + np.arange(len(others))] = -1.0
        self._face, _ = np.linalg.qr(self._root[:, None] * (self._lift @ face))
        matrix = np.zeros((n + 1 + R, n + 1 + R))
        matrix[1 : n + 1, 1 : n + 1] = 0.5 * interactions[g[:, None], s[:, None], g, s]
        matrix[choices, choices] = self._loss
        self._matrix = matrix / self._root / self._root[:, None]
        self._zero = np.zeros(matrix.shape, bool)
        self._zero[1 : n + 1, 1 : n + 1] = (g[:, None] == g) & ~np.eye(n, dtype=bool)
        self._state = np.zeros_like(matrix)
        self._state[0, 0] = 1.0
        self._cone = self._state

    @property
    def size(self) -> int:
        """Rows of the matrix whose eigenvalues each iteration needs."""
        return int(self._face.shape[1])

    def iterate(self, count: int, deadline: float = np.inf) -> None:
        """Improve the multipliers; stops while there is time for `bound`, which takes two or three iterations."""
        for _ in range(count):
            started = time.perf_counter()
            cone = self._project_cone()
            polyhedron = self._project_polyhedron(2 * cone - self._state - self._matrix / _STEP)
            self._state = self._state + _RELAX * (polyhedron - cone)
            self._cone = cone
            now = time.perf_counter()
            if now + 5 * (now - started) > deadline:
                return

    def bound(self) -> tuple[float, Floats]:
        """Lower bound of the optimum, and of that with each choice forced ``[G, S]``: infinite where not kept."""
        _, _, cost, limit = self._problem
        n, g = len(self._group), self._group
        multipliers = _STEP * (self._state - self._project_cone())
        # Within the face these have no positive eigenvalue but for rounding, which is taken off the objective.
        largest = float(np.linalg.eigvalsh(self._face.T @ multipliers @ self._face)[-1])
        excess = max(0.0, largest) + 1e-14 * float(np.linalg.norm(multipliers))
        rest = (self._matrix + multipliers - excess * np.eye(len(multipliers))) * self._root * self._root[:, None]
        rest = (rest + rest.T) / 2
        # Products with a slack are at least zero: drop those that cost something, write out the others.
        rest[n + 1 :] = np.minimum(rest[n + 1 :], 0.0)
        rest[:, n + 1 :] = rest[n + 1 :].T
        rest = self._lift.T @ rest @ self._lift
        pairs = np.minimum.reduceat(rest[1:, 1:], self._first, axis=1)
        pairs[np.arange(n), g] = 0.0
        separate = np.full(self.keep.shape, np.inf)
        separate[self.keep] = 2 * rest[0, 1:] + np.diag(rest)[1:] + pairs.sum(1)
        value, forced = separable_bound(separate, cost, limit)
        return value + float(rest[0, 0]), forced + float(rest[0, 0])

    def narrowed(self, keep: NDArray[np.bool_]) -> PsdBound:
        """The relaxation with fewer schemes, starting from the present multipliers."""
        found = PsdBound(*self._problem, keep)
        size = len(self._state)
        kept = np.concatenate([[True], keep[self.keep], np.ones(size - 1 - len(self._group), bool)])
        found._state = self._state[np.ix_(kept, kept)]
        found._cone = self._cone[np.ix_(kept, kept)]
        return found

    def share(self) -> Floats:
        """How much of each choice the relaxation takes ``[G, S]``, zero where not kept."""
        found = np.zeros(self.keep.shape)
        n = len(self._group)
        found[self.keep] = self._cone[0, 1 : n + 1] / self._root[1 : n + 1]
        return found

    def _project_cone(self) -> Floats:
        values, vectors = np.linalg.eigh(self._face.T @ self._state @ self._face)
        positive = values > 0
        vectors = self._face @ vectors[:, positive]
        found: Floats = (vectors * values[positive]) @ vectors.T
        return found

    def _project_polyhedron(self, matrix: Floats) -> Floats:
        """Nearest matrix with no negative entries, exclusive schemes apart and each choice equal to its square."""
        choices = np.arange(1, len(self._group) + 1)
        root = self._root[choices]
        found = np.maximum(matrix, 0.0)
        found[self._zero] = 0.0
        first, square = matrix[0, choices], matrix[choices, choices]
        share = np.clip((2 * first + root * square) / (2 * root + root**3), 0.0, 1.0)
        found[0, choices] = found[choices, 0] = root * share
        found[choices, choices] = root**2 * share
        found[0, 0] = 1.0
        return found


def separable_bound(loss: Floats, cost: Floats, limit: Floats) -> tuple[float, Floats]:
    """Lagrangian bound of a separable problem: prices of the rows, improved one after the other.

    Args:
        loss: ``[G, S]``, infinite where not allowed.
        cost: ``[G, S, R]``.
        limit: ``[R]``, finite.

    Returns:
        The bound, and that with each choice forced ``[G, S]``.
    """
    R = len(limit)
    prices = np.zeros(R)
    for r in [*range(R)] * min(R, 2):
        prices[r] = 0.0
        priced = loss + cost @ prices
        sweep = hull_sweep(priced, cost[..., r])
        spent = cost[np.arange(len(loss)), sweep.start, r].sum() + np.cumsum(sweep.added_cost)
        cut = int(np.searchsorted(spent, limit[r], side="right"))
        prices[r] = sweep.slope[cut] if cut < len(sweep.slope) else 0.0
    priced = loss + cost @ prices
    least = priced.min(1, keepdims=True)
    value = float(least.sum() - prices @ limit)
    return value, value + priced - least
