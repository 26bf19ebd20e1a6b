"""Integer linear program for several constraints at once, by PuLP with HiGHS."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pulp

from mpq.problem import Problem, Solution, Status, infeasible, solved

_FEASIBILITY = 1e-9


@dataclass(frozen=True)
class Ilp:
    """Exact solver for any number of constraints and rows.

    HiGHS accepts rows violated by its tolerance; a pick that really violates a limit is cut off by
    tightening that limit and solving again.

    Attributes:
        time_limit: Seconds; after that the best pick found is returned as `FEASIBLE` with its bound.
        seed: Random seed of HiGHS.
    """

    time_limit: float = 60.0
    seed: int = 0

    def solve(self, problem: Problem) -> Solution:
        """Solve a problem."""
        started = time.perf_counter()
        # HiGHS has absolute tolerances, so losses and rows are scaled to about one.
        loss_scale = float(np.abs(problem.loss[problem.allowed]).max()) or 1.0
        tighten = 0.0
        for _ in range(4):
            remaining = max(0.1, self.time_limit - (time.perf_counter() - started))
            model, choose = _build(problem, loss_scale, tighten)
            solver = pulp.HiGHS(
                msg=False,
                timeLimit=remaining,
                gapRel=0.0,
                gapAbs=0.0,
                threads=1,
                random_seed=self.seed,
                mip_feasibility_tolerance=_FEASIBILITY,
                primal_feasibility_tolerance=_FEASIBILITY,
            )
            model.solve(solver)
            seconds = time.perf_counter() - started
            if model.sol_status == pulp.LpSolutionInfeasible:
                return infeasible(problem, seconds, "ilp")
            if model.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
                message = f"no pick found within {self.time_limit:g} s; raise the time limit"
                return Solution(Status.NO_SOLUTION, None, np.inf, -np.inf, {}, seconds, "ilp", {}, message)
            pick = np.array([max(row, key=lambda s: row[s].value() or 0.0) for row in choose])
            if problem.feasible(pick):
                # PuLP's `status` says Optimal at a time limit; `sol_status` does not.
                proven = model.sol_status == pulp.LpSolutionOptimal and tighten == 0.0
                bound = float(model.solverModel.getInfo().mip_dual_bound) * loss_scale
                return solved(problem, pick, bound, seconds, "ilp", proven=proven)
            tighten = max(2 * tighten, 2 * _FEASIBILITY)
        message = "HiGHS found only picks that violate a limit by its tolerance; loosen the limit slightly"
        return Solution(Status.NO_SOLUTION, None, np.inf, -np.inf, {}, seconds, "ilp", {}, message)


def _build(problem: Problem, loss_scale: float, tighten: float) -> tuple[Any, list[dict[int, Any]]]:
    """The PuLP model and its binary variables, one dict of allowed schemes per group."""
    model = pulp.LpProblem("mpq", pulp.LpMinimize)
    choose = [
        {int(s): model.add_variable(f"x_{g}_{s}", cat="Binary") for s in np.flatnonzero(allowed)}
        for g, allowed in enumerate(problem.allowed)
    ]
    model += pulp.lpSum(problem.loss[g, s] / loss_scale * x for g, row in enumerate(choose) for s, x in row.items())
    for row in choose:
        model += pulp.lpSum(row.values()) == 1
    for c in problem.constraints:
        for r, limit in enumerate(c.slack_limit):
            if np.isposinf(limit):
                continue
            scale = max(abs(limit), float(np.abs(c.cost[..., r]).max())) or 1.0
            total = pulp.lpSum(c.cost[g, s, r] / scale * x for g, row in enumerate(choose) for s, x in row.items())
            model += total <= limit / scale - tighten
    return model, choose
