"""The integer program that is left after reduced-cost fixing, by PuLP with HiGHS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp
from numpy.typing import NDArray

from mpq.problem import Floats, Ints, PairCosts, Status

_FEASIBILITY = 1e-9  # HiGHS's tolerance, absolute, on numbers scaled to about one
_STATUS = {
    pulp.LpSolutionOptimal: Status.OPTIMAL,
    pulp.LpSolutionIntegerFeasible: Status.FEASIBLE,
    pulp.LpSolutionInfeasible: Status.INFEASIBLE,
}


@dataclass(frozen=True, eq=False)
class Core:
    """Pick among the choices that are left: least of ``reduced cost + price of the room left``.

    This is the excess of the total loss over the relaxation's bound. It is measured in units of the gap between bound
    and best known pick, so that HiGHS's absolute tolerances are relative to what is still undecided, whatever the
    orders of magnitude of the losses.

    Attributes:
        reduced: ``[G, S]``, zero at each group's base.
        keep: Choices that are left ``[G, S]``; the base always is.
        base: Choice of each group if no other is made ``[G]``.
        cost: ``[G, S, R]``.
        limit: ``[R]``, finite.
        prices: ``[R]``.
        gap: The unit of the objective, positive.
        pairs: What pairs of groups add to a row, with its number.
    """

    reduced: Floats
    keep: NDArray[np.bool_]
    base: Ints
    cost: Floats
    limit: Floats
    prices: Floats
    gap: float
    pairs: tuple[tuple[int, PairCosts], ...] = ()

    def solve(
        self, start: Ints | None, cuts: list[Ints], seconds: float, seed: int, nodes: int | None = None
    ) -> tuple[Status, Ints | None, float]:
        """Run HiGHS.

        Args:
            start: A pick to start from.
            cuts: Picks that may not be made.
            seconds: Time limit.
            seed: HiGHS's random seed.
            nodes: Limit of nodes, which unlike time reproduces.

        Returns:
            Status, the pick if any, and a lower bound of the excess.
        """
        model, choose = self._model(cuts)
        options = {
            "mip_feasibility_tolerance": _FEASIBILITY,
            "primal_feasibility_tolerance": _FEASIBILITY,
            "dual_feasibility_tolerance": _FEASIBILITY,
            "random_seed": seed,
            **({} if nodes is None else {"mip_max_nodes": nodes}),
        }
        first = None
        if start is not None and all(self.keep[np.arange(len(start)), start]):
            first = {x.name: float(start[g] == s) for (g, s), x in choose.items()}
        solver = _WarmHighs(first, msg=False, timeLimit=seconds, gapRel=0.0, gapAbs=0.0, threads=1, **options)
        model.solve(solver)
        # PuLP's `status` says Optimal at a time limit; `sol_status` does not.
        status = _STATUS.get(model.sol_status, Status.NO_SOLUTION)
        if status not in (Status.OPTIMAL, Status.FEASIBLE):
            return status, None, 0.0
        pick = self.base.copy()
        for (g, s), x in choose.items():
            if (x.value() or 0.0) > 0.5:
                pick[g] = s
        return status, pick, self.gap * float(model.solverModel.getInfo().mip_dual_bound)

    def _model(self, cuts: list[Ints]) -> tuple[Any, dict[tuple[int, int], Any]]:
        """The PuLP model, and its binary variables: choices other than the base."""
        groups = np.arange(len(self.base))
        others = self.keep.copy()
        others[groups, self.base] = False
        g, s = np.nonzero(others)
        model = pulp.LpProblem("mpq", pulp.LpMinimize)
        x = [model.add_variable(f"x_{a}_{b}", cat="Binary") for a, b in zip(g, s, strict=True)]
        terms = [(v, c) for v, c in zip(x, (self.reduced[g, s] / self.gap).tolist(), strict=True)]
        choose = dict(zip(zip(g.tolist(), s.tolist(), strict=True), x, strict=True))
        added = self.cost[g, s] - self.cost[g, self.base[g]]
        room = self.limit - self.cost[groups, self.base].sum(0)
        rows = []
        for r in range(len(room)):
            scale = max(float(np.abs(added[:, r]).max(initial=0.0)), abs(float(room[r]))) or 1.0
            slack = model.add_variable(f"slack_{r}", lowBound=0)
            taken = [(slack, 1.0)]
            for p, pairs in enumerate(pairs for row, pairs in self.pairs if row == r):
                joint, links = self._joint(model, choose, pairs, f"{r}_{p}")
                taken += [(v, c / scale) for v, c in joint]
                rows += links
            terms += [(v, c * self.prices[r] * scale / self.gap) for v, c in taken]
            row = [*zip(x, (added[:, r] / scale).tolist(), strict=True), *taken]
            rows.append(pulp.LpAffineExpression(row) == float(room[r]) / scale)
        model += pulp.LpAffineExpression(terms)
        for row in rows:
            model += row
        ends = np.append(np.flatnonzero(np.diff(g)) + 1, len(g))
        for a, b in zip([0, *ends[:-1]], ends, strict=True):
            if b - a > 1:
                model += pulp.LpAffineExpression([(v, 1.0) for v in x[a:b]]) <= 1
        for cut in cuts:
            if self.keep[groups, cut].all():
                taken = cut[g] == s
                changed = [(v, -1.0 if t else 1.0) for v, t in zip(x, taken, strict=True)]
                model += pulp.LpAffineExpression(changed) >= 1 - int(taken.sum())
        return model, choose

    def _joint(
        self, model: Any, choose: dict[tuple[int, int], Any], pairs: PairCosts, name: str
    ) -> tuple[list[tuple[Any, float]], list[Any]]:
        """Variables that are 1 where both groups of a pair made their choices, with their costs, and what ties them.

        Schemes that cost the same beside all others (equal activation formats) are one case. The sums over the other
        group's cases are the choices themselves, which is the tightest such program (Sherali and Adams, 1990).
        """
        priced, links = [], []
        for p, ((a, b), cost) in enumerate(zip(pairs.groups.tolist(), pairs.cost, strict=True)):
            first, second = np.flatnonzero(self.keep[a]), np.flatnonzero(self.keep[b])
            small = cost[np.ix_(first, second)]
            if not small.any():
                continue
            _, row_case = np.unique(small, axis=0, return_inverse=True)
            _, column_case = np.unique(small, axis=1, return_inverse=True)
            shape = row_case.max() + 1, column_case.max() + 1
            joint = [
                [model.add_variable(f"y_{name}_{p}_{i}_{j}", 0, 1) for j in range(shape[1])] for i in range(shape[0])
            ]
            known = np.zeros(shape)
            known[np.ix_(row_case, column_case)] = small
            priced += [(joint[i][j], float(known[i, j])) for i, j in zip(*np.nonzero(known), strict=True)]
            for i, row in enumerate(joint):
                links.append(pulp.lpSum(row) == self._chosen(choose, a, first[row_case == i]))
            for j, column in enumerate(zip(*joint, strict=True)):
                links.append(pulp.lpSum(column) == self._chosen(choose, b, second[column_case == j]))
        return priced, links

    def _chosen(self, choose: dict[tuple[int, int], Any], g: int, schemes: Ints) -> Any:
        """1 if a group takes one of the schemes."""
        base = int(self.base[g])
        if base not in schemes:
            return pulp.lpSum(choose[g, s] for s in schemes.tolist())
        return 1 - pulp.lpSum(x for (h, s), x in choose.items() if h == g and s not in schemes)


class _WarmHighs(pulp.HiGHS):  # type: ignore[misc]
    """PuLP's HiGHS with values to start from and limits of nodes, neither of which PuLP itself passes on."""

    def __init__(self, start: dict[str, float] | None, **options: Any) -> None:
        super().__init__(**options)
        self._start = start

    def callSolver(self, lp: Any) -> None:  # noqa: N802 - PuLP names it
        """Called by PuLP once the model is built."""
        if self._start is not None:
            known = [(v.index, self._start[v.name]) for v in lp.variables() if v.name in self._start]
            index, value = zip(*known, strict=True) if known else ((), ())
            lp.solverModel.setSolution(len(index), np.array(index, np.int32), np.array(value, np.float64))
        super().callSolver(lp)

    def findSolutionValues(self, lp: Any) -> tuple[int, int]:  # noqa: N802 - PuLP names it
        """Called by PuLP at the end."""
        try:
            found: tuple[int, int] = super().findSolutionValues(lp)
        except KeyError:  # HiGHS's status of a limit of nodes
            if np.isinf(lp.solverModel.getObjectiveValue()):
                return pulp.LpStatusNotSolved, pulp.LpSolutionNoSolutionFound
            return pulp.LpStatusOptimal, pulp.LpSolutionIntegerFeasible
        return found
