"""The allocation problem as arrays, and what a solver returns. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpq.errors import MpqError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Slack of limits, relative: sums of floats differ with the order of summation; sums of whole numbers are exact, but
# their limit may come from a product such as 0.3 * 10.
FLOAT_TOLERANCE, WHOLE_TOLERANCE = 1e-9, 1e-12


@dataclass(frozen=True, eq=False)
class PairCosts:
    """What neighbours cost each other, such as the conversion of a tensor from one layer's format to the next's.

    Attributes:
        groups: ``[P, 2]``: pairs of different groups.
        cost: ``[P, S, S]``: of the scheme of the first and that of the second; never negative.
    """

    groups: Ints
    cost: Floats

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", np.asarray(self.groups, np.int64).reshape(-1, 2))
        object.__setattr__(self, "cost", np.asarray(self.cost, np.float64))
        if self.cost.ndim != 3 or len(self.cost) != len(self.groups) or self.cost.shape[1] != self.cost.shape[2]:
            raise MpqError(f"pair costs must be [pairs, S, S], not {self.cost.shape} for {len(self.groups)} pairs")
        if (self.groups[:, 0] == self.groups[:, 1]).any():
            raise MpqError("pairs are of two different groups; what a group costs itself belongs to its own cost")
        if not (np.isfinite(self.cost) & (self.cost >= 0)).all():
            raise MpqError("pair costs must be finite and not negative")

    def total(self, pick: ArrayLike) -> float:
        """Sum over all pairs of a pick ``[G]``."""
        first, second = np.asarray(pick, np.int64)[self.groups.T]
        return float(self.cost[np.arange(len(self.cost)), first, second].sum())

    def with_others(self, pick: ArrayLike) -> Floats:
        """What each choice costs with what all other groups of a pick ``[G]`` took ``[G, S]``."""
        picks, rows = np.asarray(pick, np.int64), np.arange(len(self.cost))
        first, second = self.groups.T
        found = np.zeros((len(picks), self.cost.shape[1]))
        np.add.at(found, first, self.cost[rows, :, picks[second]])
        np.add.at(found, second, self.cost[rows, picks[first]])
        return found

    def interactions(self, groups: int) -> Floats:
        """The same costs as interactions ``[G, S, G, S]``."""
        S = self.cost.shape[1]
        found = np.zeros((groups, S, groups, S))
        for (g, h), cost in zip(self.groups.tolist(), self.cost, strict=True):
            found[g, :, h] += cost
            found[h, :, g] += cost.T
        return found

    @property
    def largest(self) -> float:
        """The largest sum that any pick could have."""
        return float(self.cost.max((1, 2), initial=0.0).sum())


@dataclass(frozen=True, eq=False)
class Constraint:
    """Each row's sum over groups stays under its limit.

    Attributes:
        name: Metric, such as ``size``.
        unit: Unit of cost and limit.
        cost: ``[G, S, R]``; ``[G, S]`` is taken as one row.
        limit: ``[R]``; a number is taken as one row.
        pairs: What neighbours add to the one row.
    """

    name: str
    unit: str
    cost: Floats
    limit: Floats
    pairs: PairCosts | None = None

    def __post_init__(self) -> None:
        cost = np.asarray(self.cost, np.float64)
        object.__setattr__(self, "cost", cost[..., None] if cost.ndim == 2 else cost)
        object.__setattr__(self, "limit", np.atleast_1d(np.asarray(self.limit, np.float64)))
        if self.cost.ndim != 3 or self.limit.shape != self.cost.shape[2:]:
            raise MpqError(f"constraint {self.name!r}: cost {self.cost.shape} and limit {self.limit.shape} don't fit")
        if not np.isfinite(self.cost).all() or np.isnan(self.limit).any():
            raise MpqError(f"constraint {self.name!r}: costs must be finite and limits not NaN")
        if np.isneginf(self.limit).any():
            raise MpqError(f"constraint {self.name!r}: no pick meets a limit of -inf; give a number, or inf for none")
        if self.pairs is not None and (len(self.limit) != 1 or self.pairs.cost.shape[1:] != (self.cost.shape[1],) * 2):
            raise MpqError(f"constraint {self.name!r}: pair costs need one row and the same schemes")

    @cached_property
    def slack_limit(self) -> Floats:
        """The limit with a tolerance for rounding of sums, ``[R]``."""
        whole = (self.cost == np.round(self.cost)).all((0, 1)) & (self.pairs is None)
        tolerance: Floats = np.where(whole, WHOLE_TOLERANCE, FLOAT_TOLERANCE)
        return self.limit + tolerance * np.abs(self.limit)

    def usage(self, pick: ArrayLike) -> Floats:
        """Row sums ``[R]`` of a pick ``[G]``, pairs included."""
        total: Floats = _take(self.cost, pick).sum(0)
        return total if self.pairs is None else total + self.pairs.total(pick)


@dataclass(frozen=True, eq=False)
class Problem:
    """Pick one scheme per group: least total loss under the constraints.

    Attributes:
        loss: ``[G, S]``; infinite where a scheme is not allowed.
        constraints: Any number of constraints; all must hold.
        interactions: ``[G, S, G, S]`` or None: what each pair of choices adds to the sum of their losses (it may be
            negative); symmetric, zero where both are of one group.
    """

    loss: Floats
    constraints: tuple[Constraint, ...] = ()
    interactions: Floats | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss", np.asarray(self.loss, np.float64))
        object.__setattr__(self, "constraints", tuple(self.constraints))
        if self.loss.ndim != 2:
            raise MpqError(f"loss must be [groups, schemes], not {self.loss.shape}")
        if np.isnan(self.loss).any() or np.isneginf(self.loss).any():
            raise MpqError("losses must be numbers or +inf")
        for c in self.constraints:
            if c.cost.shape[:2] != self.loss.shape:
                raise MpqError(f"constraint {c.name!r}: cost {c.cost.shape[:2]} but loss {self.loss.shape}")
        names = [c.name for c in self.constraints]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise MpqError(f"constraints must have different names; used twice: {', '.join(twice)}")
        if self.interactions is not None:
            object.__setattr__(self, "interactions", check_interactions(self.interactions, self.loss.shape))
        blocked = np.flatnonzero(~self.allowed.any(1))
        if len(blocked):
            raise MpqError(f"group {blocked[0]} has no allowed scheme")

    @cached_property
    def allowed(self) -> NDArray[np.bool_]:
        """``[G, S]``: where the loss is finite."""
        return np.isfinite(self.loss)

    def objective(self, pick: ArrayLike) -> float:
        """Total loss of a pick ``[G]``, interactions included."""
        return float(_take(self.loss, pick).sum()) + pair_sum(self.interactions, pick)

    def usage(self, pick: ArrayLike) -> dict[str, Floats]:
        """Constraint name -> row sums ``[R]`` of a pick."""
        return {c.name: c.usage(pick) for c in self.constraints}

    def feasible(self, pick: ArrayLike) -> bool:
        """Whether a pick is allowed and meets every constraint."""
        allowed = bool(_take(self.allowed, pick).all())
        return allowed and all(bool((c.usage(pick) <= c.slack_limit).all()) for c in self.constraints)

    def smallest_usage(self) -> dict[str, Floats]:
        """Constraint name -> smallest reachable row sums ``[R]``, each row on its own and without its pairs."""
        masked = {c.name: np.where(self.allowed[..., None], c.cost, np.inf) for c in self.constraints}
        return {name: cost.min(1, initial=np.inf).sum(0) for name, cost in masked.items()}

    def largest_usage(self) -> dict[str, Floats]:
        """Constraint name -> what row sums ``[R]`` never exceed: each row on its own, with the most its pairs cost."""
        masked = {c.name: np.where(self.allowed[..., None], c.cost, -np.inf) for c in self.constraints}
        pairs = {c.name: 0.0 if c.pairs is None else c.pairs.largest for c in self.constraints}
        return {name: cost.max(1, initial=-np.inf).sum(0) + pairs[name] for name, cost in masked.items()}

    def least(self, name: str, loss_limit: float) -> Problem:
        """The other direction: the least of a constraint's metric, with the total loss under a limit.

        All other constraints stay; that of the metric goes, and one called ``loss`` comes if its limit is finite. What
        the metric costs pairs of groups become interactions.

        Raises:
            MpqError: If there is no such constraint, it has several rows, the loss has interactions, or another
                constraint is called ``loss`` already.
        """
        found = next((c for c in self.constraints if c.name == name), None)
        if found is None or found.cost.shape[2] != 1:
            known = ", ".join(c.name for c in self.constraints if c.cost.shape[2] == 1) or "none"
            raise MpqError(f"{name!r} is not a constraint with one row; there are: {known}")
        if self.interactions is not None:
            raise MpqError("a loss with interactions can't be a constraint: it is no sum over groups")
        loss = Constraint("loss", "", np.where(self.allowed, self.loss, 0.0), np.array([loss_limit]))
        others = tuple(c for c in self.constraints if c is not found)
        limited = () if np.isposinf(loss_limit) else (loss,)
        joint = None if found.pairs is None else found.pairs.interactions(len(self.loss))
        return Problem(np.where(self.allowed, found.cost[..., 0], np.inf), (*others, *limited), joint)


def pair_sum(interactions: Floats | None, pick: ArrayLike) -> float:
    """Sum of the interactions ``[G, S, G, S]`` over all pairs of groups of a pick ``[G]``; 0 for None."""
    if interactions is None:
        return 0.0
    picks = np.asarray(pick, np.int64)
    groups = np.arange(len(picks))
    return 0.5 * float(interactions[groups[:, None], picks[:, None], groups, picks].sum())


def check_interactions(interactions: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Interactions as float64.

    Raises:
        MpqError: If they don't fit losses of this shape ``(G, S)``, aren't finite and symmetric, or not zero within
            a group.
    """
    found = np.asarray(interactions, np.float64)
    G, S = shape
    if found.shape != (G, S, G, S):
        raise MpqError(f"interactions must be {(G, S, G, S)}, not {found.shape}")
    square = found.reshape(G * S, G * S)
    if not np.isfinite(square).all() or not np.allclose(square, square.T, rtol=1e-9, atol=1e-12):
        raise MpqError("interactions must be finite and symmetric")
    if found[np.arange(G), :, np.arange(G)].any():
        raise MpqError("interactions within a group must be zero: they belong to its loss")
    return found


def _take(values: NDArray[np.generic], pick: ArrayLike) -> NDArray[np.generic]:
    picks = np.asarray(pick, np.int64)
    return values[np.arange(len(values)), picks]


class Status(Enum):
    """How a solver ended. Only `OPTIMAL` and `INFEASIBLE` are proofs."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    INFEASIBLE = "infeasible"
    NO_SOLUTION = "no solution"


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver returns.

    Attributes:
        status: See `Status`; a limit of time or states never passes for optimality.
        pick: Scheme index per group ``[G]``, or None.
        objective: Total loss of the pick (infinite without one).
        bound: Proven lower bound of the optimum.
        usage: Constraint name -> row sums of the pick.
        seconds: Time taken.
        solver: Name of the solver.
        prices: Constraint name -> loss saved per unit of a looser limit (dual price), where known.
        message: Why there is no solution and what is reachable.
    """

    status: Status
    pick: Ints | None
    objective: float
    bound: float
    usage: Mapping[str, Floats]
    seconds: float
    solver: str
    prices: Mapping[str, float] = field(default_factory=dict)
    message: str = ""

    @property
    def gap(self) -> float:
        """``objective - bound``, relative to the objective; 0 is proven optimal."""
        if self.pick is None:
            return float("inf")
        return (self.objective - self.bound) / max(abs(self.objective), 1e-300) if self.objective > self.bound else 0.0


def solved(
    problem: Problem,
    pick: ArrayLike,
    bound: float,
    seconds: float,
    solver: str,
    prices: Mapping[str, float] | None = None,
    *,
    proven: bool = False,
) -> Solution:
    """A `Solution` for a feasible pick, its objective and usage recomputed from the problem.

    Args:
        problem: What was solved.
        pick: Scheme index per group.
        bound: Lower bound of the optimum; rounding above the objective is cut off.
        seconds: Time taken.
        solver: Name of the solver.
        prices: Dual prices.
        proven: The pick is optimal: the bound becomes the objective.
    """
    picked = np.asarray(pick, np.int64)
    objective = problem.objective(picked)
    bound = objective if proven else min(bound, objective)
    status = Status.OPTIMAL if bound >= objective else Status.FEASIBLE
    return Solution(status, picked, objective, bound, problem.usage(picked), seconds, solver, prices or {})


def without_groups(problem: Problem, solver: str) -> Solution:
    """The `Solution` of a problem without groups: its one pick is empty."""
    if not problem.feasible([]):
        return infeasible(problem, 0.0, solver)
    return solved(problem, [], 0.0, 0.0, solver, proven=True)


def infeasible(problem: Problem, seconds: float, solver: str) -> Solution:
    """A `Solution` that says which constraints can't be met and what is reachable."""
    parts = []
    for c in problem.constraints:
        least = problem.smallest_usage()[c.name]
        over = np.flatnonzero(least > c.slack_limit)
        if len(over):
            r = over[0]
            parts.append(f"{c.name} <= {c.limit[r]:g} {c.unit}: the smallest reachable is {least[r]:g}")
    pairs = [c.name for c in problem.constraints if c.pairs is not None]
    together = "no pick meets all constraints" if pairs else "each constraint can be met alone, but not all together"
    beside = f", with what neighbours add to {', '.join(pairs)}" if pairs else ""
    message = "; ".join(parts) or together + beside
    return Solution(Status.INFEASIBLE, None, float("inf"), float("inf"), {}, seconds, solver, {}, message)
